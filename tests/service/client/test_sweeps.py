"""Sweeps and comparisons through both clients, against the real API."""

import asyncio
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from service.client import AsyncClient, Client, Conflict, Invalid, NotFound
from service.http.schemas import SweepCheckpointEvent, SweepStatusEvent
from service.jobs import queue
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
    assert [event.data.status for event in events if isinstance(event.data, SweepStatusEvent)][-1] == "succeeded"
    assert [event.data.percent for event in events if isinstance(event.data, SweepCheckpointEvent)] == [0, 100] * 2
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


def test_a_comparison_is_a_table_in_a_notebook_and_a_frame_in_pandas(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    with Client(api.url) as client:
        job = client.submit(TEXT, TINY, name="<b>&")
        found = client.compare(job.id)
    html = found._repr_html_()
    assert html.startswith("<table><thead><tr><th>job</th><th>status</th>")
    assert "<td>&lt;b&gt;&amp;</td><td>queued</td>" in html
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    assert found.to_pandas() == found.rows


def test_a_dry_run_and_the_ready_experiments(api: Api) -> None:
    with Client(api.url) as client:
        before = client.list_sweeps().data
        assert client.estimate_sweep(TEXT, TINY, grid={"n_layer": [1, 2]}).n_jobs == 2
        for preset in client.presets():
            given = preset.sweep
            estimate = client.estimate_sweep(
                given.text, given.config, grid=given.grid, points=given.points, seeds=given.seeds
            )
            assert 1 <= estimate.n_jobs <= 9
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
    assert [event.id for event in rest] == ["2", "3", "4"]


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
            assert len(await sweep.series()) == 2
            assert (await client.get_sweep(sweep.id)).is_terminal
            await sweep.delete()

    asyncio.run(go())
