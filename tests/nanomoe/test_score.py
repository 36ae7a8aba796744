import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from nanomoe.config import JobConfig
from nanomoe.model import GPT
from nanomoe.score import longest_copied_span, losses_of_tokens


def plain_longest(scored: bytes, training: bytes) -> int:
    for length in range(min(len(scored), len(training)), 0, -1):
        if any(scored[i : i + length] in training for i in range(len(scored) - length + 1)):
            return length
    return 0


@given(
    st.binary(max_size=40).map(lambda b: bytes(x % 3 for x in b)),
    st.binary(max_size=60).map(lambda b: bytes(x % 3 for x in b)),
)
def test_the_longest_span_is_that_of_a_plain_search_and_stands_in_both(scored: bytes, training: bytes) -> None:
    span = longest_copied_span(scored, training)
    assert span.n_bytes == plain_longest(scored, training)
    copied = scored[span.start : span.start + span.n_bytes]
    assert copied == training[span.training_start : span.training_start + span.n_bytes]


def test_a_copy_inside_a_long_text_is_found_where_it_stands() -> None:
    training = b"".join(b"%d " % n for n in range(200_000))
    scored = b"abc " + training[700_000:700_321] + b" xyz"
    span = longest_copied_span(scored, training)
    assert (span.n_bytes, span.start, span.training_start) == (321, 4, 700_000)


@pytest.mark.parametrize("n_tokens", [2, 8, 30])
def test_losses_are_those_of_the_plain_formula_window_by_window(n_tokens: int) -> None:
    config = JobConfig(n_layer=1, n_head=2, n_embd=16, block_size=8)
    model = GPT.build(config, 20)
    model.init_weights(1)
    tokens = torch.randint(20, (n_tokens,), generator=torch.Generator().manual_seed(2))
    losses = losses_of_tokens(model, tokens.tolist())
    assert len(losses) == n_tokens - 1
    first = min(n_tokens - 1, 8)
    logits = model(tokens[None, :first]).logits_BTV[0]
    expected = F.cross_entropy(logits, tokens[1 : first + 1], reduction="none")
    assert losses[:first] == pytest.approx(expected.tolist(), rel=1e-5)
