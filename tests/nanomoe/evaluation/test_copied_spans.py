import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomoe.evaluation import copied_spans
from nanomoe.evaluation.copied_spans import longest_copied_span


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
    training = b"".join(b"%d " % n for n in range(20_000))
    scored = b"abc " + training[70_001:70_322] + b" xyz"
    span = longest_copied_span(scored, training)
    assert (span.n_bytes, span.start, span.training_start) == (321, 4, 70_001)


def test_a_copy_across_two_parts_of_a_training_text_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copied_spans, "_PART", 10)
    training = b"0123456789abcdefghijklmnopqrstuvwxyz"
    for start in range(20):
        span = longest_copied_span(b"--" + training[start : start + 13] + b"--", training)
        assert (span.n_bytes, span.start, span.training_start) == (13, 2, start)
