"""The event decoder, byte by byte."""

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from service.client.sse import EventDecoder, ServerSentEvent

STREAM = (
    ": ping\n\n"
    'event: status\nid: 1\ndata: {"status": "running"}\n\n'
    'event: checkpoint\r\nid: 2\r\ndata: {"text": "a\u2028b\x85c çã 🐈"}\r\n\r\n'
    "event: step\rdata: first\rdata: second\r\r"
    "retry: 100\n\n"
    "data: no name\n\n"
    "event: unfinished\ndata: lost\n"
).encode()
EVENTS = [
    ServerSentEvent("status", '{"status": "running"}', "1"),
    ServerSentEvent("checkpoint", '{"text": "a\u2028b\x85c çã 🐈"}', "2"),
    ServerSentEvent("step", "first\nsecond", None),
    ServerSentEvent("message", "no name", None),
]


def decode(chunks: list[bytes]) -> list[ServerSentEvent]:
    decoder = EventDecoder()
    return [event for chunk in chunks for event in decoder.feed(chunk)]


def test_an_id_alone_is_the_position_of_the_stream() -> None:
    decoder = EventDecoder()
    assert list(decoder.feed(b"id: 41\n\n")) == []
    assert decoder.last_id == "41"
    (event,) = decoder.feed(b"id: 42\nevent: status\ndata: {}\n\nevent: step\ndata: ")
    assert (event.id, decoder.last_id) == ("42", "42")
    assert [event.id for event in decoder.feed(b"{}\n\n")] == [None]
    assert decoder.last_id == "42"


@given(st.sets(st.integers(0, len(STREAM)), max_size=40))
@example(set(range(len(STREAM))))
@example(set())
def test_a_stream_gives_the_same_events_however_it_is_cut(cuts: set[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    assert decode([STREAM[a:b] for a, b in pairwise(edges)]) == EVENTS
