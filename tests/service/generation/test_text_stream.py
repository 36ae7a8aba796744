from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomoe.tokenizer import load_tokenizer
from service.generation.text_stream import TextStream

BYTES = load_tokenizer("bytes")


def _sent(text: str, stop: tuple[str, ...], cuts: list[int]) -> tuple[list[str], bool]:
    """What is sent of a text that comes in pieces cut at these bytes, and whether it was stopped."""
    ids = BYTES.encode(text)
    stream = TextStream(BYTES, stop)
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    pieces = [stream.push(ids[begin:end]) for begin, end in pairwise(edges)]
    return [*pieces, stream.finish()], stream.stopped


def test_a_character_is_sent_whole() -> None:
    stream = TextStream(BYTES)
    assert [stream.push([byte]) for byte in "aé🦜".encode()] == ["a", "", "é", "", "", "", "🦜"]
    assert stream.finish() == ""


def test_a_character_that_never_ends_becomes_the_replacement_character() -> None:
    stream = TextStream(BYTES)
    assert stream.push("a🦜".encode()[:3]) == "a"
    assert stream.finish() == "\ufffd"


def test_what_may_begin_a_stop_string_is_held_back_until_it_is_known() -> None:
    stream = TextStream(BYTES, ["\n\nFim"])
    sent = [stream.push(BYTES.encode(piece)) for piece in ("uma\n", "\n", "Fi", "o", "\n\nF", "im")]
    assert sent == ["uma", "", "", "\n\nFio", "", ""]
    assert stream.stopped
    assert stream.push(BYTES.encode("mais")) == ""
    assert stream.finish() == ""


def test_what_was_held_back_is_sent_when_the_text_ends() -> None:
    stream = TextStream(BYTES, ["\n\n"])
    assert stream.push(BYTES.encode("fim\n")) == "fim"
    assert stream.finish() == "\n"
    assert not stream.stopped


def test_the_first_of_several_stop_strings_ends_the_text() -> None:
    assert _sent("um, dois. tres", (".", ","), [20]) == (["um", "", ""], True)


@given(
    text=st.text(alphabet="ab\né🦜", max_size=30),
    stop=st.lists(st.text(alphabet="ab\né", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 60), max_size=12),
)
def test_it_does_not_matter_how_many_tokens_come_at_once(text: str, stop: list[str], cuts: list[int]) -> None:
    ends = [(text.find(string) + len(string), text.find(string)) for string in stop if string in text]
    sent, stopped = _sent(text, tuple(stop), cuts)
    assert stopped == bool(ends)
    assert "".join(sent) == (text[: min(ends)[1]] if ends else text)


def test_the_stop_string_that_is_complete_first_ends_the_text() -> None:
    for cuts in ([], [1], [2], [3], [1, 2, 3]):
        assert "".join(_sent("xabc", ("abc", "b"), cuts)[0]) == "xa"


@given(
    text=st.text(alphabet="ab\né🦜", max_size=30),
    stop=st.lists(st.text(alphabet="ab\né", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 60), max_size=12),
)
def test_the_tokens_that_begin_in_the_text_are_those_before_its_end(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    ids = BYTES.encode(text)
    stream = TextStream(BYTES, stop)
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    sent = ""
    for begin, end in pairwise(edges):
        sent += stream.push(ids[begin:end])
        assert stream.n_begun == len(sent.encode()), "of bytes, all that make a character that was sent"
    sent += stream.finish()
    assert stream.n_begun == len(sent.encode())


def test_a_token_that_a_stop_string_cuts_is_the_last() -> None:
    tokenizer = load_tokenizer("ptbr-8k")
    ids = tokenizer.encode(" roupa do rei")
    stream = TextStream(tokenizer, ["pa d"])
    assert (stream.push(ids), stream.stopped) == (" rou", True)
    assert tokenizer.decode(ids[: stream.n_begun]) == " roupa"


@pytest.mark.parametrize("stop", [(), ("x",), ("\ufffd",)])
def test_a_stop_string_matters_only_if_there_is_one(stop: tuple[str, ...]) -> None:
    assert TextStream(BYTES, stop).has_stops == bool(stop)
