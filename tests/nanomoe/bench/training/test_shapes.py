"""The shapes are those that their names and figures say."""

import pytest

from nanomoe.bench.training.shapes import SHAPES, text_of
from nanomoe.data import Windows
from nanomoe.plan import Plan
from nanomoe.tokenizer import load_tokenizer


@pytest.mark.parametrize("name", ["reference", "reference-50k", "small", "small-mixture", "gpt2"])
def test_a_text_is_cut_into_the_windows_of_its_shape(name: str) -> None:
    import torch

    shape = SHAPES[name.removesuffix("-mixture")]
    shape = shape.mixture() if name.endswith("-mixture") else shape
    tokenizer = shape.tokenizer()
    assert tokenizer.vocab_size == shape.vocab_size
    tokens = tokenizer.encode(shape.text(tokenizer))
    windows = Windows(torch.tensor(tokens), shape.config.block_size)
    assert (windows.count, windows.length) == (shape.n_windows, shape.length)
    assert max(tokens) < shape.vocab_size
    assert Plan.of(shape.config, len(tokens)).steps_per_epoch == 1


def test_a_token_meets_as_many_parameters_in_the_mixture_but_for_the_routers() -> None:
    for shape in SHAPES.values():
        twin = shape.mixture()
        assert twin.n_active_params == pytest.approx(shape.n_active_params, rel=0.01)
        assert twin.n_params > shape.n_params
        assert twin.config.dropout == shape.config.dropout


def test_the_124m_model_has_the_published_flops_of_nanogpt() -> None:
    shape = SHAPES["gpt2"]
    N = shape.n_params - 1024 * 768  # nanoGPT leaves the positions out
    assert 123e6 < N < 125e6
    assert shape.flops == 12 * 1024 * (6 * N + 12 * 12 * 12 * 64 * 1024)


@pytest.mark.parametrize("n_tokens", [1, 97, 1000])
def test_a_text_has_exactly_as_many_tokens_as_asked_for(n_tokens: int) -> None:
    for name in ("bytes", "ptbr-8k"):
        tokenizer = load_tokenizer(name)
        assert len(tokenizer.encode(text_of(tokenizer, n_tokens))) == n_tokens
