"""The engine's start, end and restart, and what its requests are answered then."""

import asyncio
import errno
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from service.errors import ServiceError, Unavailable
from service.generation.admission import Generation
from tests.service.generation.generations import ANSWERING, Run, failure, first_chunk, script_engines, settings
from tests.service.tiny_checkpoint import TinyCheckpoint, write_tiny_checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


def test_a_request_while_an_engine_starts_waits_for_that_one(
    run: Run, generation: Generation, tiny: TinyCheckpoint
) -> None:
    preloaded = generation._engine._process
    assert preloaded is not None
    run(generation.preload())
    run(generation.generate(tiny.request()))
    assert generation._engine._process is preloaded


def test_an_engine_that_does_not_become_ready_is_killed_and_answered_503(
    run: Run, tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_engines(monkeypatch, "while True: receive()")
    generation = Generation(settings(engine_start_seconds=0.3))

    async def ask_two() -> list[ServiceError]:
        return await asyncio.gather(*(failure(generation.generate(tiny.request())) for _ in range(2)))

    for error in run(ask_two()):
        assert (error.status, error.code) == (503, "generation_unavailable")
        assert "not ready after 0.3 seconds" in error.detail
        assert error.retry_after is not None
    assert generation._engine._process is None
    run(generation.stop())


def test_an_engine_that_dies_is_answered_503_and_restarted(
    run: Run, generation: Generation, tiny: TinyCheckpoint
) -> None:
    async def kill_while_generating() -> ServiceError:
        async with await first_chunk(generation, tiny):
            waiting = asyncio.create_task(failure(generation.generate(tiny.request(max_new_tokens=50_000))))
            await asyncio.sleep(0)
            assert generation._engine._process is not None
            os.kill(generation._engine._process.pid, signal.SIGKILL)
            return await waiting

    error = run(kill_while_generating())
    assert isinstance(error, Unavailable)
    assert error.code == "engine_restarted"
    assert error.retry_after is not None
    assert len(run(generation.generate(tiny.request())).choices[0].tokens) == 8


def test_a_line_that_is_no_message_ends_the_engine_and_the_next_request_starts_another(
    run: Run, generation: Generation, tiny: TinyCheckpoint
) -> None:
    async def break_the_stream() -> ServiceError:
        async with await first_chunk(generation, tiny):
            waiting = asyncio.create_task(failure(generation.generate(tiny.request(max_new_tokens=50_000))))
            await asyncio.sleep(0)
            assert generation._engine._process is not None
            assert generation._engine._process.stdout is not None
            # Past what lies in the buffer already, which ends with a line or within one.
            generation._engine._process.stdout.feed_data(b"\nno message\n")
            return await waiting

    with capture_logs() as logged:
        error = run(break_the_stream())
    assert error.code == "engine_restarted"
    assert "generation_engine_message_invalid" in [entry["event"] for entry in logged]
    assert len(run(generation.generate(tiny.request())).choices[0].tokens) == 8


def test_a_line_that_is_too_long_ends_the_engine(
    run: Run, tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.generation.engine_process._MAX_LINE_BYTES", 200)
    script_engines(monkeypatch, 'send(type="ready"); receive(); print("x" * 300, flush=True); receive()')
    generation = Generation(settings())
    error = run(failure(generation.generate(tiny.request())))
    assert (error.status, error.code) == (503, "engine_restarted")
    assert generation._engine._process is None
    run(generation.stop())


@pytest.mark.parametrize("allowed", [False, True])
def test_an_engine_keeps_a_higher_niceness_that_it_has(
    run: Run, tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    asked: list[int] = []

    def setpriority(which: int, who: int, niceness: int) -> None:
        asked.append(niceness)
        if not allowed:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "getpriority", lambda which, who: 3)
    monkeypatch.setattr(os, "setpriority", setpriority)
    script_engines(monkeypatch, ANSWERING)
    generation = Generation(settings(engine_nice=2))  # little: the rest of its session's share is really taken
    with capture_logs() as logged:
        assert run(generation.generate(tiny.request())).summary.prompt_tokens == 1
    assert asked == [3]
    assert ("generation_engine_priority_unchanged" in [entry["event"] for entry in logged]) == (not allowed)
    run(generation.stop())


def test_an_engine_without_its_first_line_is_killed_and_gets_no_request(
    run: Run, tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def fail(pid: int, niceness: int) -> None:
        started.append(os.pidfd_open(pid))
        raise RuntimeError("a fault between the start and the first line")

    script_engines(monkeypatch, ANSWERING)
    generation = Generation(settings())
    with monkeypatch.context() as patched:
        patched.setattr("service.generation.engine_process._lower_priority", fail)
        with pytest.raises(RuntimeError, match="a fault between"):
            run(generation.generate(tiny.request()))
    assert generation._engine._process is None
    assert select.select(started, [], [], 10)[0], "a pidfd is readable once its process has ended"
    os.close(started[0])
    assert run(generation.generate(tiny.request())).summary.prompt_tokens == 1
    run(generation.stop())


def test_an_engine_that_cannot_start_is_answered_503_without_trying_at_every_request(
    run: Run, tiny: TinyCheckpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    generation = Generation(settings(engine_device="cuda:99"))
    for _ in range(2):
        error = run(failure(generation.generate(tiny.request())))
        assert (error.status, error.code) == (503, "generation_unavailable")
        assert error.retry_after is not None
    assert capfd.readouterr().err.count("Traceback") == 1
    run(generation.stop())


def test_stopping_answers_what_is_being_generated_and_ends_the_process(run: Run, tiny: TinyCheckpoint) -> None:
    async def stop_while_generating() -> tuple[ServiceError, int | None, ServiceError]:
        generation = Generation(settings(engine_max_new_tokens=100_000))
        async with await first_chunk(generation, tiny):
            process = generation._engine._process
            assert process is not None
            waiting = asyncio.create_task(failure(generation.generate(tiny.request(max_new_tokens=50_000))))
            await asyncio.sleep(0)
            await generation.stop()
            return await waiting, process.returncode, await failure(generation.generate(tiny.request()))

    during, status, after = run(stop_while_generating())
    assert (during.status, after.status) == (503, 503)
    assert status == 0


_ORPHAN = """
import asyncio, sys
from service.generation.messages import EngineRequest
from service.generation.admission import Generation
from service.settings import Settings

async def main():
    generation = Generation(Settings(_env_file=None, engine_max_new_tokens=10**6))
    assert "torch" not in sys.modules
    async for _ in generation.stream(EngineRequest.model_validate_json(sys.argv[1])):
        print(generation._engine._process.pid, flush=True)

asyncio.run(main())
"""


def test_the_engine_dies_with_its_parent_which_never_loads_torch(tiny: TinyCheckpoint) -> None:
    request = tiny.request(max_new_tokens=10**6).model_dump_json()
    with subprocess.Popen([sys.executable, "-c", _ORPHAN, request], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        engine = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    try:
        assert select.select([engine], [], [], 10)[0], "a pidfd is readable once its process has ended"
    finally:
        os.close(engine)


def test_every_thread_of_the_engine_has_its_niceness(run: Run, tiny: TinyCheckpoint) -> None:
    generation = Generation(settings(engine_nice=10))
    run(generation.generate(tiny.request()))
    assert generation._engine._process is not None
    threads = Path(f"/proc/{generation._engine._process.pid}/task")
    assert {os.getpriority(os.PRIO_PROCESS, int(thread.name)) for thread in threads.iterdir()} == {10}
    session = Path(f"/proc/{generation._engine._process.pid}/autogroup")
    assert not session.exists() or session.read_text().endswith(" nice 10\n")
    run(generation.stop())
