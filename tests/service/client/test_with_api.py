"""Both clients against the real API: what they read is what it writes."""

import asyncio
from pathlib import Path

import pytest

from nanomoe import __version__
from nanomoe.config import ConfigWarning
from service.client import AsyncClient, Client, Conflict, Invalid, JobEvent, NotFound
from service.http.schemas import CheckpointMetrics, JobView, StatusEvent
from service.jobs import queue, recording
from tests.api import TEXT, Api

TINY = {"tokenizer": "bytes", "epochs": 3}


def test_a_job_from_its_submission_to_its_deletion(api: Api) -> None:
    with Client(api.url) as client:
        job = client.submit(TEXT, TINY, name="uma", tags={"a": "b"})
        assert (job.view.name, job.view.config.epochs, job.view.status) == ("uma", 3, "queued")
        assert job.text() == TEXT
        assert job.update(name="duas").name == job.refresh().name == "duas"
        assert job.view.tags == {"a": "b"}
        assert [found.id for found in client.jobs(tag="a:b")] == [job.id]
        assert job.pause().status == "paused"
        assert job.resume().status == "queued"
        with pytest.raises(Conflict) as caught:
            job.delete()
        assert caught.value.code == "job_not_finished"
        assert job.cancel().status == job.cancel().status == "cancelled"
        assert job.wait().status == "cancelled"
        job.delete()
        with pytest.raises(NotFound) as missing:
            client.job(job.id)
        assert missing.value.code == "job_not_found"


def test_a_key_of_one_s_own_finds_the_job_again(api: Api) -> None:
    with Client(api.url) as client:
        first = client.submit(TEXT, TINY, idempotency_key="mine")
        assert client.submit(TEXT, TINY, idempotency_key="mine").id == first.id
        with pytest.raises(Invalid) as caught:
            client.submit(TEXT + "!", TINY, idempotency_key="mine")
        assert caught.value.code == "idempotency_key_reused"
        first.cancel()


def test_a_dry_run_makes_no_job(api: Api) -> None:
    with Client(api.url) as client:
        before = len(list(client.jobs()))
        estimate = client.estimate(TEXT, TINY)
        assert estimate.total_steps == 3
        assert estimate.quarters[100] == 3
        assert len(list(client.jobs())) == before


def test_a_bad_config_names_each_fault(api: Api) -> None:
    with Client(api.url) as client, pytest.raises(Invalid) as caught:
        client.submit(TEXT, {"epochs": "many", "lr": -1})
    assert {tuple(fault.loc[-1:]) for fault in caught.value.errors} == {("epochs",), ("lr",)}


def test_an_empty_prompt_is_refused_by_name_before_a_model_is_loaded(api: Api) -> None:
    job_id = api.finished()
    with Client(api.url) as client:
        for ask in (client.job(job_id).generate, client.job(job_id).inspect):
            with pytest.raises(Invalid, match="no token that stands for the start of a text") as caught:
                ask("")
            assert caught.value.code == "empty_prompt"
            assert caught.value.errors[0].loc == ["body", "prompt"]


def test_what_was_measured_and_recorded_comes_back(api: Api, tmp_path: Path) -> None:
    job_id = api.finished()
    with Client(api.url) as client:
        job = client.job(job_id)
        metrics = job.metrics(points=8)
        assert [checkpoint.percent for checkpoint in metrics.checkpoints] == [0, 100]
        assert metrics.checkpoints[0].continuation is not None
        assert metrics.checkpoints[0].continuation.text == "def"
        assert metrics.steps.train_loss[0] == 10
        without = job.metrics(tokens=False).checkpoints[0].reconstruction
        assert without is not None
        assert without.tokens is None
        assert job.metrics_csv().startswith("step,train_loss,lr,grad_norm")
        assert [checkpoint.percent for checkpoint in job.checkpoints()] == [0, 100]
        assert job.checkpoint().percent == 100
        page = job.reconstruction(0, start=2, count=3)
        assert [token.target for token in page.data] == ["d", "e", "f"]
        assert page.start == 2

        paths = job.download_checkpoint("latest", tmp_path / "new")
        assert sorted(path.name for path in paths) == [file.name for file in job.checkpoint().files]
        assert job.download(100, "model.safetensors", tmp_path / "weights").read_bytes() == bytes(range(256)) * 4
        with pytest.raises(NotFound) as caught:
            job.download(100, "nothing.bin", tmp_path)
        assert caught.value.code == "file_not_found"
        with pytest.raises(NotFound):
            job.checkpoint(50)
        assert not (tmp_path / "nothing.bin").exists()


def test_workers_health_and_readiness_are_answered(api: Api) -> None:
    with Client(api.url) as client:
        assert client.health().version == __version__
        assert client.readiness().database == "sqlite"
        assert isinstance(client.workers(), list)


def run_job(api: Api, job_id: str) -> None:
    """What a worker does with a short job."""
    claim = api.claim(job_id)
    recording.record_prepared(
        api.db, claim, execution={}, n_tokens=9, total_steps=3, model={"n_params": 1, "n_active_params": 1}
    )
    api.record_checkpoint(claim, 0, 0)
    api.record_steps(claim, 1, 3)
    recording.record_event(api.db, claim, "warning", {"code": "dead_expert", "message": "expert 3"})
    api.record_checkpoint(claim, 100, 3)
    queue.finish(api.db, claim, "succeeded")


def check_events(events: list[JobEvent]) -> None:
    told = [(event.kind, event.data) for event in events if event.id is not None]
    assert [data.status for _, data in told if isinstance(data, StatusEvent)] == ["queued", "running", "succeeded"]
    assert [data.percent for _, data in told if isinstance(data, CheckpointMetrics)] == [0, 100]
    assert [data.code for _, data in told if isinstance(data, ConfigWarning)] == ["dead_expert"]
    ids = [int(event.id) for event in events if event.id is not None]
    assert ids == sorted(set(ids))


def test_waiting_sees_all_that_happens(api: Api) -> None:
    events: list[JobEvent] = []

    def work_once_connected(event: JobEvent) -> None:
        events.append(event)
        if len(events) == 1:
            run_job(api, job.id)

    with Client(api.url) as client:
        job = client.submit(TEXT, TINY)
        assert job.wait(on_event=work_once_connected).status == "succeeded"
        check_events(events)
        last = max(int(event.id) for event in events if event.id is not None)
        assert list(job.events(str(last))) == []


def test_an_event_loop_waits_as_well(api: Api) -> None:
    events: list[JobEvent] = []

    async def use() -> JobView:
        async with AsyncClient(api.url) as client:
            job = await client.submit(TEXT, TINY)

            async def work_once_connected(event: JobEvent) -> None:
                events.append(event)
                if len(events) == 1:
                    await asyncio.to_thread(run_job, api, job.id)

            ended = await job.wait(on_event=work_once_connected)
            assert [found.id async for found in client.jobs()][0] == job.id  # noqa: RUF015
            assert [checkpoint.percent for checkpoint in await job.checkpoints()] == [0, 100]
            return ended

    assert asyncio.run(use()).status == "succeeded"
    check_events(events)


def test_a_job_that_is_gone_while_it_is_watched_is_an_error(api: Api) -> None:
    with Client(api.url) as client:
        job = client.submit(TEXT, TINY)
        job.cancel()
        job.delete()
        with pytest.raises(NotFound):
            job.wait()
