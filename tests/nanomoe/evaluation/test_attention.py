import pytest
import torch
from torch import Tensor

from nanomoe.config import JobConfig
from nanomoe.evaluation.attention import inspect
from nanomoe.export import gpt2_model
from nanomoe.model.gpt import GPT


def built(**config: object) -> GPT:
    parsed = JobConfig.model_validate({"n_embd": 16, "n_layer": 3, "n_head": 2, "block_size": 8} | config)
    model = GPT.build(parsed, 50)
    model.init_weights(1)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.c_attn.weight.mul_(20)  # attention far from even
    return model


def test_attention_and_the_next_token_are_those_of_transformers_gpt2() -> None:
    model = built()
    tokens = [3, 1, 4, 1, 5, 9]
    found = inspect(model, tokens)
    theirs = gpt2_model(model.state_dict(), model.config)
    theirs.set_attn_implementation("eager")
    output = theirs(torch.tensor([tokens]), output_attentions=True)
    torch.testing.assert_close(found.attention_LHTT, torch.cat(output.attentions).detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.probabilities_V, output.logits[0, -1].softmax(-1).detach(), rtol=1e-4, atol=1e-6)


def test_each_token_is_routed_as_in_the_forward_pass() -> None:
    model = built(use_moe=True, moe_stride=2)
    found = inspect(model, [1, 2, 3])
    routings = model(torch.tensor([[1, 2, 3]])).routings
    assert list(found.routing) == [1]
    for name in ("logits_TE", "probs_TE", "chosen_TK", "gates_TK"):
        torch.testing.assert_close(getattr(found.routing[1], name), getattr(routings[1], name))


def test_only_the_newest_tokens_of_a_long_prompt_are_read() -> None:
    model = built()

    def shape(found: Tensor) -> tuple[int, ...]:
        return tuple(found.shape)

    long, newest = inspect(model, list(range(20))), inspect(model, list(range(12, 20)))
    assert shape(long.attention_LHTT) == (3, 2, 8, 8)
    assert torch.equal(long.probabilities_V, newest.probabilities_V)
    with pytest.raises(ValueError, match="no token"):
        inspect(model, [])
