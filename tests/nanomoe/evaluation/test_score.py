import math

import pytest
import torch
from torch.nn import functional as F

from nanomoe.config import JobConfig
from nanomoe.evaluation.score import logprobs_of_tokens, losses_of_tokens
from nanomoe.model.gpt import GPT


@pytest.mark.parametrize("n_tokens", [2, 8, 30])
def test_losses_are_those_of_the_plain_formula_window_by_window(n_tokens: int) -> None:
    config = JobConfig(n_layer=1, n_head=2, n_embd=16, block_size=8)
    model = GPT.build(config, 20)
    model.init_weights(1)
    tokens = torch.randint(20, (n_tokens,), generator=torch.Generator().manual_seed(2))
    losses = losses_of_tokens(model, tokens.tolist())
    assert len(losses) == n_tokens - 1
    # Windows of 8 from the start on; the last is moved back to be whole, and tells what no other has told.
    for target in range(1, n_tokens):
        start = min((target - 1) // 8 * 8, max(0, n_tokens - 1 - 8))
        logits = model(tokens[None, start : start + 8]).logits_BTV[0, target - 1 - start]
        assert losses[target - 1] == pytest.approx(F.cross_entropy(logits, tokens[target]).item(), rel=1e-5)


@pytest.mark.parametrize(("n_tokens", "n_likeliest"), [(1, 2), (2, 0), (8, 3), (30, 99)])
def test_log_probabilities_are_minus_the_losses_beside_the_likeliest(n_tokens: int, n_likeliest: int) -> None:
    config = JobConfig(n_layer=1, n_head=2, n_embd=16, block_size=8)
    model = GPT.build(config, 20)
    model.init_weights(1)
    tokens = torch.randint(20, (n_tokens,), generator=torch.Generator().manual_seed(2)).tolist()
    found = logprobs_of_tokens(model, tokens, n_likeliest)
    losses = losses_of_tokens(model, tokens) if n_tokens > 1 else []
    assert [one.chosen.token for one in found] == tokens[1:]
    assert [one.chosen.logprob for one in found] == pytest.approx([-loss for loss in losses], rel=1e-5)
    for one, token in zip(found, tokens[1:], strict=True):
        likeliest = dict(one.likeliest)
        assert len(likeliest) == min(n_likeliest, 20)
        assert list(likeliest.values()) == sorted(likeliest.values(), reverse=True)
        assert all(logprob >= one.chosen.logprob for logprob in likeliest.values()) or token in likeliest
        if n_likeliest >= 20:
            assert sum(map(math.exp, likeliest.values())) == pytest.approx(1)
            assert likeliest[token] == one.chosen.logprob
