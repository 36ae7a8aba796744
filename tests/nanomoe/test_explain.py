import pytest
import torch

from nanomoe.config import JobConfig
from nanomoe.explain import explain
from nanomoe.model import GPT


def built(**config: object) -> GPT:
    parsed = JobConfig.model_validate({"n_embd": 16, "n_layer": 2, "block_size": 8} | config)
    model = GPT.build(parsed, 50)
    model.init_weights(1)
    return model


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_every_number_follows_from_the_logits_by_hand(norm_topk_prob: bool) -> None:
    model = built(use_moe=True, norm_topk_prob=norm_topk_prob)
    explanation = explain(model, [3, 1, 4, 1, 5], " e")
    (layer,) = explanation.layers
    assert (explanation.token, explanation.token_id, explanation.position, layer.layer) == (" e", 5, 4, 1)
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
    model = built(use_moe=True, router_bias_update_rate=0.1)
    before = explain(model, [7], "a").layers[0]
    bias = model.moe_layers[1].router.balance_bias
    assert bias is not None
    loser = next(score.expert for score in before.experts if score.gate is None)
    bias[loser] = 1.0
    after = explain(model, [7], "a").layers[0]
    assert after.chosen[0] == loser
    assert after.experts[loser].balance_bias == 1.0
    assert [s.probability for s in after.experts] == [s.probability for s in before.experts]


def test_a_prompt_longer_than_the_context_is_read_from_its_end() -> None:
    assert explain(built(use_moe=True), list(range(20)), "x").position == 7


def test_a_dense_model_and_an_empty_prompt_have_nothing_to_explain() -> None:
    with pytest.raises(ValueError, match="use_moe false"):
        explain(built(), [1], "a")
    with pytest.raises(ValueError, match="no token"):
        explain(built(use_moe=True), [], "")
