"""Drafted continuations beside those of the engine, which computes one token after the other."""

import random
from collections.abc import Sequence

import pytest

from nanomoe.config import SamplingConfig
from nanomoe.generation import continuation
from nanomoe.generation.continuation import continue_tokens
from nanomoe.generation.engine import Engine, Request
from nanomoe.model.gpt import GPT
from tests.nanomoe.generation.models import BLOCK_SIZE, CONFIGS, random_model

GREEDY = SamplingConfig(temperature=0)
HOW = [GREEDY, SamplingConfig(), SamplingConfig(temperature=0.7, top_k=5)]
PROMPT = [1, 2, 3]
N_NEW = BLOCK_SIZE - len(PROMPT)


def one_by_one(model: GPT, how: SamplingConfig, n_new: int = N_NEW) -> list[int]:
    return Engine(model.state_dict(), model.config).run([Request(PROMPT, n_new, how, seed=11)])[0].new


def drafted(model: GPT, how: SamplingConfig, expected: Sequence[int] = (), n_new: int = N_NEW) -> tuple[list[int], int]:
    """The new tokens, and the number of passes."""
    passes: list[None] = []
    new = continue_tokens(
        model.eval(),
        PROMPT,
        max_new_tokens=n_new,
        how=how,
        seed=11,
        expected=expected,
        before_pass=lambda: passes.append(None),
    )
    return new, len(passes)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", CONFIGS)
def test_whatever_is_expected_the_new_tokens_are_those_of_the_engine(name: str, how: SamplingConfig) -> None:
    model = random_model(**CONFIGS[name])
    right = one_by_one(model, how)
    wrong = random.Random(0).choices(range(model.vocab_size), k=N_NEW)  # noqa: S311
    half = [*right[: N_NEW // 2], *wrong[N_NEW // 2 :]]
    for expected in ([], right[:3], right, half, wrong, [*right, 5]):
        assert drafted(model, how, expected)[0] == right


def test_a_pass_is_taken_for_each_wrong_guess_and_not_for_each_token() -> None:
    model = random_model()
    right = one_by_one(model, GREEDY)
    assert drafted(model, GREEDY, right)[1] == 1
    assert 1 < drafted(model, GREEDY, [*right[:5], (right[5] + 1) % model.vocab_size])[1] <= N_NEW - 5


def test_a_model_that_repeats_itself_is_read_twice() -> None:
    model = random_model()
    model.transformer.wpe.weight.data.zero_()
    for block in model.transformer.h:  # nothing is added to the embedding of the last token, which is likeliest
        block.attn.c_proj.weight.data.zero_()
        block.attn.c_proj.bias.data.zero_()
        block.mlp.c_proj.weight.data.zero_()
        block.mlp.c_proj.bias.data.zero_()
    new, n_passes = drafted(model, GREEDY, expected=[7, 8, 9])
    assert new == one_by_one(model, GREEDY)
    assert n_passes <= 2


def test_a_long_continuation_is_computed_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    slid = drafted(model, GREEDY, n_new=N_NEW + 5)
    assert slid == (one_by_one(model, GREEDY, N_NEW + 5), N_NEW + 5)
    monkeypatch.setattr(continuation, "MOST_DRAFTED", 10)
    assert drafted(model, GREEDY, n_new=8) == (one_by_one(model, GREEDY, 8), 8)


def test_nothing_is_added_where_nothing_is_asked_for() -> None:
    assert drafted(random_model(), GREEDY, n_new=0) == ([], 0)


def test_a_stop_ends_a_continuation_between_two_passes() -> None:
    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        continue_tokens(random_model(), PROMPT, max_new_tokens=3, how=GREEDY, seed=0, before_pass=stop)
