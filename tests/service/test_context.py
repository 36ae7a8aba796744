"""What the API runs beside its routes, whatever goes wrong with it."""

import asyncio
import threading

import pytest
from structlog.testing import capture_logs

from service.context import open_context
from service.generation import Generation
from service.queue import Rescuer
from service.settings import Settings
from tests.databases import ONLY_SQLITE

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
    monkeypatch.setattr("service.context._rescue_now_and_then", end)
    asyncio.run(open_and_close())
    assert len(stopped) == 1
