"""Sweeps and comparisons through both clients, against the real API."""

import asyncio
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.client import AsyncClient, Client, Conflict, Invalid, NotFound
from service.http.schemas import JobCheckpointEvent, JobStatusEvent
from service.jobs import queue, reads
from tests.api import TEXT, Api

TINY = {"tokenizer": "bytes", "epochs": 3}


def finish_all(api: Api, sweep: Any) -> None:
    """Train the jobs of a sweep as a worker does, each to a loss of its own."""
    for number, job_id in enumerate(sweep.job_ids, start=1):
        queue.resume(api.db, job_id)  # paused when another was claimed
        api.finish(api.claim(job_id), loss=1 / number)


def test_a_sweep_from_its_submission_to_its_deletion(api: Api) -> None:
    with Client(api.url) as client:
        sweep = client.sweep(TEXT, TINY, grid={"lr": (1e-4, 5e-3)}, seeds=2, name="taxas", tags={"a": "b"})
        assert (sweep.name, sweep.status, sweep.tags, sweep.config) == ("taxas", "queued", {"a": "b"}, TINY)
        assert {one.name: one.values for one in sweep.parameters} == {"lr": [1e-4, 5e-3], "seed": [42, 43]}
        assert [job.config.lr for job in sweep.jobs()] == [1e-4, 1e-4, 5e-3, 5e-3]
        assert client.get_sweep(sweep.id).job_ids == sweep.job_ids
        assert client.list_sweeps(limit=1).data[0].id == sweep.id
        assert sweep.pause().status == "paused"
        assert sweep.resume().status == "queued"
        with pytest.raises(Conflict, match="have not ended"):
            sweep.delete()
        assert not sweep.is_terminal
        assert sweep.cancel().status == "cancelled"
        assert sweep.wait().status == "cancelled"
        assert sweep.is_terminal
        sweep.delete()
        with pytest.raises(NotFound):
            sweep.refresh()


def test_a_sweep_is_waited_for_and_compared(api: Api) -> None:
    events = []
    with Client(api.url) as client:
        sweep = client.sweep(TEXT, TINY, points=[{"dropout": 0.0}, {"dropout": 0.5}])
        finish_all(api, sweep)
        assert sweep.wait(on_event=events.append).status == "succeeded"
        found = sweep.compare(["loss", "accuracy"], perplexity=1.7, at_step=2)
        curves = sweep.series(points=4)
    assert [event.data.status for event in events if isinstance(event.data, JobStatusEvent)][-1] == "succeeded"
    assert [event.data.percent for event in events if isinstance(event.data, JobCheckpointEvent)] == [0, 100] * 2
    numbers = [int(event.id) for event in events]
    assert numbers == sorted(set(numbers))
    assert found.parameters == {"dropout": [0.0, 0.5]}
    assert [(row["dropout"], row["percent"], row["loss"]) for row in found] == [
        (0.0, 0, 2.0), (0.0, 100, 1.0), (0.5, 0, 2.0), (0.5, 100, 0.5),
    ]  # fmt: skip
    assert [(row.get("steps_until"), row["train_loss_at_step"]) for row in found.last] == [(None, 5.0), (3, 5.0)]
    assert found.best is not None
    assert (found.best.job_id, found.best.value) == (sweep.job_ids and sweep.job_ids[1], 0.5)
    assert [len(curve.low) for curve in curves] == [2, 2]


def test_jobs_are_compared_by_name_and_tag(api: Api) -> None:
    with Client(api.url) as client:
        jobs = [client.submit(TEXT, TINY | {"lr": lr}, tags={"by": "tag"}) for lr in (1e-4, 1e-3)]
        found = client.compare(*(job.id for job in jobs))
        assert found.parameters == client.compare(tag="by=tag").parameters == {"lr": [1e-4, 1e-3]}
        assert [(row["status"], row["percent"], row["loss"]) for row in found.rows] == [("queued", None, None)] * 2
        assert [curve.last_step for curve in client.compare_series(tag="by=tag")] == [0, 0]
        assert (
            client.compare_csv(tag="by=tag", metrics=["loss"]).splitlines()[0]
            == "job_id,name,status,lr,percent,step,loss"
        )
        assert len(found) == 2
        assert repr(found) == "<Comparison of 2 jobs by lr>"
        with pytest.raises(Invalid):
            client.compare()


def test_a_comparison_shows_its_curves_in_a_notebook_and_is_a_frame_in_pandas(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(api.url) as client:
        jobs = [client.submit(TEXT, TINY | {"lr": lr}, name="<b>&") for lr in (1e-4, 1e-3)]
        finish_all(api, SimpleNamespace(job_ids=[job.id for job in jobs]))
        found = client.compare(*(job.id for job in jobs))
        html = found._repr_html_()
        assert html.count("<svg") == 2  # curves over steps, and the loss over lr
        assert "lr 0.001" in html
        alone = client.compare(jobs[0].id)._repr_html_()
        assert "&lt;b&gt;&amp;" in alone
        assert "<b>&" not in alone
    assert "did not answer" in found._repr_html_()  # the client is closed
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    assert found.to_pandas() == found.rows


def test_a_job_and_a_sweep_show_themselves_in_a_notebook(api: Api) -> None:
    with Client(api.url) as client:
        sweep = client.sweep(TEXT, TINY, grid={"lr": [1e-4, 5e-3]}, name="<taxas>")
        finish_all(api, sweep)
        job = next(sweep.jobs())
        queued = client.submit(TEXT, TINY)
        as_job, as_sweep = job._repr_html_(), sweep._repr_html_()
        assert "<svg" not in queued._repr_html_()
    assert "succeeded, 100 %" in as_job
    assert as_job.count("<svg") == 1
    assert "100 %</td>" in as_job
    assert "&lt;taxas&gt;" in as_sweep
    assert "2 succeeded; lr 0.0001, 0.005" in as_sweep
    assert as_sweep.count("<svg") == 2
    # Without a service, what is known is shown all the same.
    assert "succeeded" in job._repr_html_()
    assert "lr 0.0001, 0.005" in sweep._repr_html_()


def test_curves_are_a_picture_in_one_line(api: Api, tmp_path: Path) -> None:
    with Client(api.url) as client:
        sweep = client.sweep(TEXT, TINY, grid={"lr": [1e-4, 5e-3]}, seeds=2)
        with pytest.raises(ValueError, match="no job has a step"):
            sweep.plot().save(tmp_path / "none.svg")
        assert sweep.plot().svg == ""
        finish_all(api, sweep)
        plot, found = sweep.plot(["loss"]), sweep.compare(["loss"])
        assert [curve.label for curve in client.plot(*sweep.job_ids or ()).curves] == ["lr 0.0001", "lr 0.005"]
        assert found.save(tmp_path / "curves.svg").read_text("utf-8") == plot.svg
        assert found._repr_html_() == plot._repr_html_()
    # The client is closed: a comparison would ask for its curves, and this one has them.
    assert plot.svg.startswith("<svg ")
    assert plot._repr_html_().count("<polygon") == 2
    assert "<polygon" not in found._repr_html_()


def test_an_experiment_is_one_line(api: Api) -> None:
    for job in reads.list_jobs(api.db, reads.JobFilter(status="queued")):
        queue.request_cancel(api.db, job.id)
    events: list[Any] = []
    with Client(api.url) as client:
        with pytest.raises(ValueError, match="there are reference, mixture, "):
            client.run("nope")
        worker = threading.Thread(target=api.train_queued, args=[0.5, 0.25, 0.5])
        worker.start()
        found = client.run("reference", on_event=events.append)
        worker.join()
    assert [row["loss"] for row in found.last] == [0.5, 0.25, 0.5]
    assert [curve.n_jobs for curve in found.curves] == [3]
    assert len(events) > 3


def test_a_dry_run_and_the_ready_experiments(api: Api) -> None:
    with Client(api.url) as client:
        before = client.list_sweeps().data
        assert client.estimate_sweep(TEXT, TINY, grid={"n_layer": [1, 2]}).n_jobs == 2
        for preset in client.presets():
            given = preset.sweep
            estimate = client.estimate_sweep(
                given.text, given.config, grid=given.grid, points=given.points, seeds=given.seeds
            )
            assert 3 <= estimate.n_jobs <= 12
            assert client.compare(
                tag="nobody", metrics=preset.compare.metric, perplexity=preset.compare.perplexity
            ).view
            assert [warning.code for warning in estimate.warnings] == [], preset.name
        assert client.list_sweeps().data == before


def test_the_stream_of_a_sweep_is_resumed_after_an_event(api: Api) -> None:
    with Client(api.url) as client:
        sweep = client.sweep(TEXT, TINY, seeds=2)
        events = sweep.events()
        first = next(events)
        events.close()
        queue.request_cancel_sweep(api.db, sweep.id)
        rest = list(sweep.events(last_event_id=first.id))
    numbers = [int(event.id or 0) for event in rest]
    assert len(numbers) == 3
    assert sorted([int(first.id or 0), *numbers]) == [int(first.id or 0), *numbers]


def test_the_asynchronous_client_does_the_same(api: Api) -> None:
    async def go() -> None:
        async with AsyncClient(api.url) as client:
            sweep = await client.sweep(TEXT, TINY, grid={"lr": [1e-4, 5e-3]})
            assert [job.config.lr async for job in sweep.jobs()] == [1e-4, 5e-3]
            await asyncio.to_thread(finish_all, api, sweep)
            events: list[Any] = []

            async def keep(event: Any) -> None:
                events.append(event)

            assert (await sweep.wait(on_event=keep)).status == "succeeded"
            assert len(events) > 8
            assert [row["loss"] for row in (await sweep.compare(["loss"])).last] == [1.0, 0.5]
            assert len(await sweep.series()) == len((await sweep.plot()).curves) == 2
            with pytest.raises(ValueError, match="plot"):
                (await sweep.compare()).save("none.svg")
            assert (await client.get_sweep(sweep.id)).is_terminal
            await sweep.delete()

    asyncio.run(go())
