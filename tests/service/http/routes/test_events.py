"""Server-sent events, read from a real server as they come."""

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from service.database.schema import table
from service.database.utc_time import EPOCH
from service.jobs import queue, reads, recording
from service.jobs.tables import Event, Job
from tests.api import Api, Serve


class Stream:
    """One connection's events: (event, id, data), pings and positions left out."""

    def __init__(self, answer: httpx.Response) -> None:
        self._lines = answer.iter_lines()

    def __iter__(self) -> Iterator[tuple[str, str | None, Any]]:
        event: dict[str, str] = {}
        for line in self._lines:
            name, _, value = line.partition(": ")
            if line and name:
                event[name] = value
            elif not line:
                if "data" in event:
                    yield event["event"], event.get("id"), json.loads(event["data"])
                event = {}

    def until(self, kind: str) -> list[tuple[str, str | None, Any]]:
        """The events up to the first of this kind."""
        seen = []
        for event in self:
            seen.append(event)
            if event[0] == kind:
                break
        return seen


@contextmanager
def listening(api: Api, job_id: str, last: str | None = None) -> Iterator[Stream]:
    headers = {} if last is None else {"Last-Event-ID": last}
    with api.http.stream("GET", f"/jobs/{job_id}/events", headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield Stream(answer)


def test_events_come_as_they_happen_and_end_with_the_job(api: Api) -> None:
    job_id = api.submit()["id"]
    with listening(api, job_id) as stream:
        assert stream.until("status") == [
            ("status", "1", {"status": "queued", "status_reason": None, "attempt": 0, "error": None})
        ]
        claim = api.claim(job_id)
        assert stream.until("status")[-1][2]["status"] == "running"
        api.record_steps(claim, 1, 7)
        steps = stream.until("step")
        while steps[-1][2]["step"] != 7:
            steps = stream.until("step")
        assert steps[-1][1] is None
        assert steps[-1][2]["total_steps"] == 500
        api.record_checkpoint(claim, 25, 125)
        (*_, (_, number, checkpoint)) = stream.until("checkpoint")
        assert number == "3"
        assert (checkpoint["percent"], checkpoint["loss"], checkpoint["reconstruction"]["tokens"]) == (25, 2.0, None)
        recording.record_event(api.db, claim, "warning", {"code": "dead_expert", "message": "expert 3 of layer 1"})
        assert stream.until("warning")[-1] == (
            "warning",
            "4",
            {"code": "dead_expert", "message": "expert 3 of layer 1"},
        )
        queue.finish(api.db, claim, "failed", error={"code": "loss_not_finite", "message": "at step 8"})
        *_, last = stream
    assert last[2]["status"] == "failed"
    assert last[2]["error"] == {"code": "loss_not_finite", "message": "at step 8"}


def test_a_client_that_reconnects_gets_every_stored_event(api: Api) -> None:
    job_id = api.finished()
    with listening(api, job_id) as stream:
        everything = [event for event in stream if event[1] is not None]
    numbers = [int(number or 0) for _, number, _ in everything]
    assert numbers == list(range(1, len(numbers) + 1))
    for place, number in enumerate(numbers[:-1], start=1):
        with listening(api, job_id, str(number)) as stream:
            assert list(stream) == everything[place:]


def test_a_stream_after_the_last_event_is_answered_204(api: Api) -> None:
    job_id = api.finished()
    with listening(api, job_id) as stream:
        *_, (_, last, _) = stream
    for seen in (last, "999999999999999999"):
        answer = api.http.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": str(seen)})
        assert (answer.status_code, answer.content) == (204, b"")


def test_no_step_follows_the_last_status_of_a_job_that_ends_between_two_reads(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = api.running()
    events_after = reads.events_after

    def end_then_read(*arguments: Any) -> list[Event]:
        monkeypatch.setattr(reads, "events_after", events_after)
        queue.finish(api.db, claim, "succeeded")
        return events_after(*arguments)

    monkeypatch.setattr(reads, "events_after", end_then_read)
    with listening(api, claim.job_id) as stream:
        *_, (kind, _, data) = stream
    assert (kind, data["status"]) == ("status", "succeeded")


def test_an_idle_stream_sends_keep_alive_comments(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.http.routes.events.KEEPALIVE_SECONDS", 0)
    job_id = api.submit()["id"]
    with api.http.stream("GET", f"/jobs/{job_id}/events") as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: status"
        api.submit()  # another's change: the stream looks, and finds nothing to tell
        assert next(line for line in lines if line.startswith(":")) == ": ping"
    api.http.post(f"/jobs/{job_id}/cancel")


@pytest.mark.parametrize("last", ["x", "-1", "1.5", "9" * 30, "٣"])
def test_a_malformed_event_id_is_refused(api: Api, last: str) -> None:
    answer = api.http.get(f"/jobs/{api.submit()['id']}/events", headers=[(b"Last-Event-ID", last.encode())])
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


def test_more_events_than_are_read_at_once_come_in_order(api: Api) -> None:
    job_id = api.submit()["id"]
    messages = [str(number) for number in range(2500)]
    with api.db.write() as session:
        session.add_all(
            Event(
                job_id=job_id,
                seq=seq,
                number=-seq,
                kind="warning",
                created_at=EPOCH,
                data={"code": "w", "message": message},
            )
            for seq, message in enumerate(messages, start=2)
        )
        session.execute(sa.update(table(Job)).where(table(Job).c.id == job_id).values(event_seq=2501))
    queue.request_cancel(api.db, job_id)
    with listening(api, job_id) as stream:
        assert [data["message"] for kind, _, data in stream if kind == "warning"] == messages


def test_many_open_streams_hold_no_thread(serve: Serve) -> None:
    api = serve()
    job_id = api.submit()["id"]
    n_listeners = 60  # more than there are threads for routes
    ready = threading.Barrier(n_listeners + 1, timeout=60)
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(base_url=api.url, timeout=60, limits=limits) as http, ThreadPoolExecutor(n_listeners) as pool:

        def listen() -> str:
            with http.stream("GET", f"/jobs/{job_id}/events") as answer:
                stream = Stream(answer)
                stream.until("status")
                ready.wait()
                return str(stream.until("status")[-1][2]["status"])

        heard = [pool.submit(listen) for _ in range(n_listeners)]
        ready.wait()
        assert api.http.get("/readyz").status_code == 200
        api.http.post(f"/jobs/{job_id}/cancel")
        assert {one.result(60) for one in heard} == {"cancelled"}


def test_a_shutdown_ends_the_streams_and_the_waits(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    api = serve()
    job_id = api.submit()["id"]
    stream_waits, poll_waits = threading.Event(), threading.Event()
    wait = api.context.wakeups.wait

    async def noted(change: asyncio.Event, seconds: float | None = None) -> None:
        # A stream says no time. It waits more than once: the word of the job that was submitted may come late.
        (stream_waits if seconds is None else poll_waits).set()
        await wait(change)

    monkeypatch.setattr(api.context.wakeups, "wait", noted)

    def ask() -> int:
        return httpx.get(f"{api.url}/jobs/{job_id}", params={"wait": 60, "seen": "queued"}, timeout=60).status_code

    with ThreadPoolExecutor(1) as pool, listening(api, job_id) as stream:
        stream.until("status")
        stream_waits.wait()
        waiting = pool.submit(ask)
        poll_waits.wait()
        api.loop.call_soon_threadsafe(api.server.stop)
        assert list(stream) == []
        assert waiting.result(5) == 200
