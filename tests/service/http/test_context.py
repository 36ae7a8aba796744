"""What the API runs beside its routes, whatever goes wrong with it."""

import asyncio
import threading

import pytest
from structlog.testing import capture_logs

from service.database.database import Database
from service.generation.admission import Generation
from service.http.context import open_context
from service.jobs.rescuer import Rescuer
from service.jobs.workers import WorkerIdentity, has_training, worker_started
from service.settings import Settings
from tests.databases import ONLY_SQLITE
from tests.queued import submit

pytestmark = ONLY_SQLITE


def test_a_rescue_that_fails_is_logged_and_tried_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = threading.Event(), threading.Event()

    def fail_once(rescuer: Rescuer) -> None:
        if not first.is_set():
            first.set()
            raise RuntimeError("a fault that nobody thought of")
        second.set()

    async def run_until_the_second_round() -> None:
        async with open_context(settings.model_copy(update={"rescue_seconds": 0.01})):
            assert await asyncio.to_thread(second.wait, 10)

    monkeypatch.setattr(Rescuer, "round", fail_once)
    with capture_logs() as logged:
        asyncio.run(run_until_the_second_round())
    assert [entry["log_level"] for entry in logged if entry["event"] == "rescue_failed"] == ["error"]


def test_the_engine_is_stopped_however_the_rescuer_has_ended(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[Generation] = []

    async def stop(generation: Generation) -> None:
        stopped.append(generation)

    async def end(rescuer: Rescuer, seconds: float) -> None:
        raise RuntimeError("a fault that nobody thought of")

    async def open_and_close() -> None:
        async with open_context(settings):
            await asyncio.sleep(0)

    monkeypatch.setattr(Generation, "stop", stop)
    monkeypatch.setattr("service.http.context._rescue_periodically", end)
    asyncio.run(open_and_close())
    assert len(stopped) == 1


@pytest.mark.parametrize("sign", ["a job waits", "a worker lives", "neither"])
def test_the_engine_is_started_with_the_first_sign_of_training(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, sign: str
) -> None:
    preloads: list[Generation] = []
    preloaded, looked = threading.Event(), threading.Event()

    async def preload(generation: Generation) -> None:
        preloads.append(generation)
        preloaded.set()

    def look(db: Database) -> bool:
        found = has_training(db)
        looked.set()
        return found

    async def open_and_train() -> None:
        async with open_context(settings.model_copy(update={"engine_preload": True})) as context:
            assert await asyncio.to_thread(looked.wait, 30)
            assert preloads == [], "an API without training starts nothing"
            if sign == "a job waits":
                await asyncio.to_thread(submit, context.database)
            elif sign == "a worker lives":
                await asyncio.to_thread(worker_started, context.database, WorkerIdentity(name="test"))
            if sign != "neither":
                assert await asyncio.to_thread(preloaded.wait, 30)

    monkeypatch.setattr(Generation, "preload", preload)
    monkeypatch.setattr("service.http.context.has_training", look)
    asyncio.run(open_and_train())
    assert len(preloads) == (sign != "neither")
