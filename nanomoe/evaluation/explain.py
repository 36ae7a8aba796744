"""One token's routing, with the real numbers: logits, probabilities, choice, gates, sum.

What a learner would compute by hand from the router's formula, layer by layer. Knows no model, no torch, no HTTP and no
terminal.
"""

from collections.abc import Sequence
from typing import Self

from pydantic import Field

from nanomoe.config import Strict


class ExpertScore(Strict):
    """The router's scores of one expert for a token."""

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
    """Number of shared experts, which get every token."""

    @classmethod
    def of_token(
        cls,
        layer: int,
        *,
        logits: Sequence[float],
        probabilities: Sequence[float],
        chosen: Sequence[int],
        gates: Sequence[float],
        balance_bias: Sequence[float] | None,
        shared_experts: int,
    ) -> Self:
        """Explain a token from the numbers of its router: one for each expert, in `chosen` and `gates` one for each
        choice."""
        gate_of = dict(zip(chosen, gates, strict=True))
        scores = zip(logits, probabilities, balance_bias or [0.0] * len(logits), strict=True)
        return cls(
            layer=layer,
            experts=[
                ExpertScore(expert=e, logit=logit, probability=p, balance_bias=bias, gate=gate_of.get(e))
                for e, (logit, p, bias) in enumerate(scores)
            ],
            chosen=list(chosen),
            gate_sum=sum(gates),
            shared_experts=shared_experts,
        )


class Explanation(Strict):
    """How the last token of a prompt was routed: the token that was read, not the one that follows it."""

    token: str
    """Text of the token that was read and routed."""

    token_id: int
    """Id of that token."""

    position: int = Field(ge=0)
    """Place of that token in the context, from 0."""

    predicted: str
    """Text of the token that the model finds likeliest to follow."""

    layers: list[LayerExplanation]
    """How each mixture of experts routed the token, in the order of the blocks."""
