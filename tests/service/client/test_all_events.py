"""The events of all jobs through both clients, against the real API."""

import asyncio

from service.client import AsyncClient, Client
from service.client.events import AllEventsCursor
from service.http.schemas import JobStatusEvent
from service.jobs import queue
from tests.api import TEXT, Api

TINY = {"tokenizer": "bytes", "epochs": 3}


def test_the_events_of_all_jobs_are_followed_and_resumed(api: Api) -> None:
    with Client(api.url) as client:
        job = client.submit(TEXT, TINY, tags={"by": "events"})
        start = client.events(last_event_id="0")
        first = next(event for event in start if event.data.job_id == job.id)
        start.close()
        assert (first.kind, first.data.status) == ("status", "queued")
        sweep = client.sweep(TEXT, TINY, seeds=2)
        queue.request_cancel(api.db, job.id)
        rest = client.events(last_event_id=first.id)
        assert [next(rest).data.job_id for _ in range(3)] == [*(sweep.job_ids or ()), job.id]
        rest.close()
        of_sweep = client.events(sweep=sweep.id, last_event_id="0")
        assert [next(of_sweep).data.job_id for _ in range(2)] == sweep.job_ids
        of_sweep.close()
        tagged = client.events(tag="by=events", last_event_id=first.id)
        assert next(tagged).data.status == "cancelled"
        tagged.close()


def test_a_position_without_an_event_is_what_a_broken_stream_resumes_from() -> None:
    cursor = AllEventsCursor(None, "course=nlp", None)
    assert "Last-Event-ID" not in cursor.call().headers
    assert list(cursor.feed(b"id: 41\n\n")) == []
    call = cursor.call()
    assert (call.path, call.params, call.headers["Last-Event-ID"]) == (
        "/events", {"sweep": None, "tag": "course=nlp"}, "41",
    )  # fmt: skip


def test_the_asynchronous_client_follows_them_too(api: Api) -> None:
    async def go() -> None:
        async with AsyncClient(api.url) as client:
            job = await client.submit(TEXT, TINY)
            async for event in client.events(last_event_id="0"):
                if isinstance(event.data, JobStatusEvent) and event.data.job_id == job.id:
                    assert event.data.status == "queued"
                    return

    asyncio.run(go())
