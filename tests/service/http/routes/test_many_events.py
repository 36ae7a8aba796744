"""The events of all jobs in one stream, read from a real server as they come."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from service.jobs import queue, recording
from tests.api import Api
from tests.service.http.routes.test_events import Stream


@contextmanager
def listening(api: Api, last: str | None = None, **params: str) -> Iterator[Stream]:
    headers = {} if last is None else {"Last-Event-ID": last}
    with api.http.stream("GET", "/events", params=params, headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield Stream(answer)


def take(stream: Stream, n: int) -> list[tuple[str, str | None, Any]]:
    """The next `n` events."""
    events = iter(stream)
    return [next(events) for _ in range(n)]


def told(events: list[tuple[str, str | None, Any]]) -> list[tuple[str, str]]:
    return [(data["job_id"], data.get("status", kind)) for kind, _, data in events]


def test_one_stream_has_the_events_of_all_jobs_from_now_on(api: Api) -> None:
    earlier = api.submit()["id"]
    with listening(api) as stream:
        claim = api.claim(api.submit()["id"])
        seen = take(stream, 3)
        assert told(seen) == [(claim.job_id, "queued"), (earlier, "paused"), (claim.job_id, "running")]
        api.record_steps(claim, 1, 7)
        (kind, number, data), *_ = take(stream, 1)
        while data["step"] != 7:
            ((kind, number, data),) = take(stream, 1)
        assert (kind, number, data["job_id"]) == ("step", None, claim.job_id)
        api.record_checkpoint(claim, 25, 125)
        recording.record_event(api.db, claim, "warning", {"code": "dead_expert", "message": "m"})
        queue.finish(api.db, claim, "succeeded")
        checkpoint, warning, last = take(stream, 3)
        assert (checkpoint[0], checkpoint[2]["percent"], checkpoint[2]["loss"]) == ("checkpoint", 25, 2.0)
        assert warning[2] == {"code": "dead_expert", "message": "m", "job_id": claim.job_id}
        assert told([last]) == [(claim.job_id, "succeeded")]
        api.http.post(f"/jobs/{earlier}/cancel")  # the stream goes on
        assert told(take(stream, 1)) == [(earlier, "cancelled")]


def test_a_client_that_was_cut_off_resumes_after_any_event(api: Api) -> None:
    with listening(api) as stream:
        api.finished()
        api.submit_finished_sweep()
        stored: list[tuple[str, str | None, Any]] = []
        while sum(data.get("status") == "succeeded" for _, _, data in stored) < 3:
            stored += [event for event in take(stream, 1) if event[1] is not None]
    numbers = [int(number or 0) for _, number, _ in stored]
    assert numbers == sorted(set(numbers))
    for place in (1, len(stored) // 2, len(stored) - 1):
        with listening(api, str(numbers[place - 1])) as stream:
            assert take(stream, len(stored) - place) == stored[place:]


def test_the_position_comes_before_any_event_and_resumes_the_stream(api: Api) -> None:
    with api.http.stream("GET", "/events") as answer:
        name, number = next(answer.iter_lines()).split(": ")
    assert name == "id"
    job_id = api.submit()["id"]
    with listening(api, number) as stream:
        assert told(take(stream, 1)) == [(job_id, "queued")]


def test_a_stream_is_of_a_sweep_or_of_a_tag(api: Api) -> None:
    with listening(api) as everything:
        sweep = api.submit_sweep()
        tagged = api.submit(tags={"course": "nlp"})["id"]
        api.submit(tags={"course": "other"})
        first = int(take(everything, 4)[0][1] or 0)
    with listening(api, str(first - 1), sweep=sweep["id"]) as stream:
        assert [data["job_id"] for _, _, data in take(stream, 2)] == sweep["job_ids"]
    for tag in ("course=nlp", "course:nlp"):
        with listening(api, str(first - 1), tag=tag) as stream:
            assert told(take(stream, 1)) == [(tagged, "queued")]
            api.http.post(f"/sweeps/{sweep['id']}/cancel")
            api.http.post(f"/jobs/{tagged}/{'pause' if tag == 'course=nlp' else 'cancel'}")
            assert told(take(stream, 1))[0][0] == tagged


def test_an_idle_stream_says_how_far_it_is(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.http.routes.events.KEEPALIVE_SECONDS", 0)
    sweep = api.submit_sweep()
    with api.http.stream("GET", "/events", params={"sweep": sweep["id"]}) as answer:
        ids = (int(line[4:]) for line in answer.iter_lines() if line.startswith("id: "))
        start = next(ids)
        api.submit()  # nothing for this stream, which has read past it
        assert next(number for number in ids if number > start)


@pytest.mark.parametrize(
    ("params", "last", "status", "code"),
    [
        ({"sweep": "0" * 32}, None, 404, "sweep_not_found"),
        ({"sweep": "x"}, None, 422, "invalid_request"),
        ({"tag": '"'}, None, 422, "invalid_request"),
        ({"job": "x"}, None, 422, "invalid_request"),
        ({}, "x", 422, "invalid_request"),
    ],
)
def test_a_stream_that_cannot_be_is_refused(
    api: Api, params: dict[str, str], last: str | None, status: int, code: str
) -> None:
    answer = api.http.get("/events", params=params, headers={} if last is None else {"Last-Event-ID": last})
    assert (answer.status_code, answer.json()["code"]) == (status, code)
