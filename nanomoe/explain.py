"""One token's routing, with the real numbers: logits, probabilities, choice, gates, sum.

What a learner would compute by hand from the router's formula, layer by layer. Knows no HTTP and no terminal.
"""

from pydantic import Field
from torch import no_grad, tensor

from nanomoe.config import Strict
from nanomoe.model import GPT


class ExpertScore(Strict):
    """What the router says of one expert."""

    expert: int
    """Its index, from 0."""

    logit: float
    """Row `expert` of the router's weight times the token's normalised channels."""

    probability: float
    """The logit's share: softmax over all experts, or the sigmoid over the sum of all sigmoids."""

    balance_bias: float
    """What is added to the score for choosing only."""

    gate: float | None
    """The weight of the expert's output; null where it is not chosen."""


class LayerExplanation(Strict):
    """How one layer routed the token."""

    layer: int
    """The block, from 0."""

    experts: list[ExpertScore]
    """All of them, by index."""

    chosen: list[int]
    """The k largest, in gate order."""

    gate_sum: float
    """Sum of the chosen gates: 1 where they are renormalised."""

    shared_experts: int
    """Experts that see the token whatever the router says."""


class Explanation(Strict):
    """How a prompt's last token was routed."""

    token: str
    """Its text."""

    token_id: int
    """Its id."""

    position: int = Field(ge=0)
    """Its place in the context, from 0."""

    layers: list[LayerExplanation]
    """Of each mixture of experts."""


@no_grad()
def explain(model: GPT, tokens: list[int], text_of_token: str) -> Explanation:
    """The routing of the last of `tokens` in evaluation mode, at most the newest `block_size` of them read.

    Raises:
        ValueError: there is no token, or the model has no mixture of experts.
    """
    if not tokens:
        raise ValueError("the prompt has no token")
    if not model.moe_layers:
        raise ValueError("this model has no mixture of experts: it was trained with use_moe false")
    context = tokens[-model.config.block_size :]
    model.eval()
    device = next(model.parameters()).device
    routings = model(tensor([context], device=device)).routings
    layers = []
    for layer, routing in routings.items():
        moe = model.moe_layers[layer]
        chosen = routing.chosen_TK[-1].tolist()
        gates = dict(zip(chosen, routing.gates_TK[-1].tolist(), strict=True))
        bias = moe.router.balance_bias
        biases = [0.0] * model.config.n_experts if bias is None else bias.tolist()
        scores = zip(routing.logits_TE[-1].tolist(), routing.probs_TE[-1].tolist(), biases, strict=True)
        layers.append(
            LayerExplanation(
                layer=layer,
                experts=[
                    ExpertScore(expert=e, logit=logit, probability=p, balance_bias=b, gate=gates.get(e))
                    for e, (logit, p, b) in enumerate(scores)
                ],
                chosen=chosen,
                gate_sum=sum(gates.values()),
                shared_experts=model.config.n_shared_experts,
            )
        )
    return Explanation(token=text_of_token, token_id=tokens[-1], position=len(context) - 1, layers=layers)
