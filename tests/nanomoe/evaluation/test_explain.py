import pytest
import torch

from nanomoe.config import JobConfig
from nanomoe.evaluation.attention import inspect
from nanomoe.evaluation.explain import LayerExplanation
from nanomoe.model.gpt import GPT


def built(**config: object) -> GPT:
    parsed = JobConfig.model_validate({"n_embd": 16, "n_layer": 2, "block_size": 8, "use_moe": True} | config)
    model = GPT.build(parsed, 50)
    model.init_weights(1)
    return model


def explain(model: GPT, tokens: list[int]) -> LayerExplanation:
    """The only mixture's routing of the last token, from what a forward pass says."""
    ((layer, routed),) = inspect(model, tokens).routing.items()
    bias = model.moe_layers[layer].router.balance_bias
    return LayerExplanation.of_token(
        layer,
        logits=routed.logits_TE[-1].tolist(),
        probabilities=routed.probs_TE[-1].tolist(),
        chosen=routed.chosen_TK[-1].tolist(),
        gates=routed.gates_TK[-1].tolist(),
        balance_bias=None if bias is None else bias.tolist(),
        shared_experts=model.config.n_shared_experts,
    )


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_every_number_follows_from_the_logits_by_hand(norm_topk_prob: bool) -> None:
    layer = explain(built(norm_topk_prob=norm_topk_prob), [3, 1, 4, 1, 5])
    assert layer.layer == 1
    logits = torch.tensor([score.logit for score in layer.experts])
    probabilities = logits.softmax(-1)
    assert [score.probability for score in layer.experts] == pytest.approx(probabilities.tolist(), rel=1e-5)
    top = probabilities.topk(2)
    assert layer.chosen == top.indices.tolist()
    total = top.values.sum().item() if norm_topk_prob else 1.0
    gates = [layer.experts[e].gate for e in layer.chosen]
    assert gates == pytest.approx([p / total for p in top.values.tolist()], rel=1e-5)
    assert layer.gate_sum == pytest.approx(sum(g for g in gates if g is not None))
    assert sum(score.gate is None for score in layer.experts) == 6


def test_the_balance_bias_is_shown_and_moves_the_choice_but_no_probability() -> None:
    model = built(router_bias_update_rate=0.1)
    before = explain(model, [7])
    bias = model.moe_layers[1].router.balance_bias
    assert bias is not None
    loser = next(score.expert for score in before.experts if score.gate is None)
    bias[loser] = 1.0
    after = explain(model, [7])
    assert after.chosen[0] == loser
    assert after.experts[loser].balance_bias == 1.0
    assert [s.probability for s in after.experts] == [s.probability for s in before.experts]
    assert {score.balance_bias for score in explain(built(), [7]).experts} == {0.0}
