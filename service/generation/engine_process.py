"""The engine as the API's child process: its start, its messages, its end and its restart.

One that is not ready within a time limit is killed. After an end before it was ready, the next start waits, longer each
time. Knows no request, and never imports torch.
"""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from nanomoe.store.cache import CacheAddress
from service.errors import Unavailable
from service.generation.messages import EngineReady, EngineStart, FromEngine, ToEngine, parse_from_engine, to_line
from service.settings import Settings

log = structlog.get_logger(__name__)

RETRY_SECONDS = 2.0
"""How long a refused client is told to wait before it asks again."""

_ARGUMENTS = ("-m", "service.generation.engine")
_MAX_LINE_BYTES = 256 * 2**20
_STOP_SECONDS = 3.0
_MAX_SECONDS_BETWEEN_STARTS = 30.0


class EngineProcess:
    """One engine at a time. Its methods belong to the API's event loop."""

    def __init__(
        self,
        settings: Settings,
        files: CacheAddress | None,
        *,
        on_message: Callable[[FromEngine], None],
        on_end: Callable[[Unavailable], None],
    ) -> None:
        """`files`: where files of a bucket are kept. `on_message` is given every message of the engine; `on_end`, when
        it has ended, the answer to the requests that it has not answered."""
        self._settings = settings
        self._files = files
        self._on_message = on_message
        self._on_end = on_end
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self.is_ready = False
        """Whether it answers requests."""
        self._failures = 0
        """Ends in a row before it was ready."""
        self._start_not_before = 0.0
        self._starting = asyncio.Lock()
        self._stopped = False

    async def running(self) -> asyncio.subprocess.Process:
        """The process, which is started if there is none; who asks while it starts waits for the same one.

        Raises:
            Unavailable: it cannot be started now.
        """
        async with self._starting:
            return self._process or await self._start()

    async def stop(self) -> None:
        """End the process; another is never started."""
        self._stopped = True
        process, reading = self._process, self._reading
        if process is None or reading is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await asyncio.shield(reading)
        except TimeoutError:
            _kill(process)
            await reading

    async def _start(self) -> asyncio.subprocess.Process:
        if self._stopped:
            raise Unavailable("generation_unavailable", "the service is stopping", retry_after=RETRY_SECONDS)
        delay = self._start_not_before - time.monotonic()
        if delay > 0:
            raise Unavailable("generation_unavailable", "the generation engine does not start", retry_after=delay)
        settings = self._settings
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        if settings.engine_threads is not None:
            environment["OMP_NUM_THREADS"] = str(settings.engine_threads)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *_ARGUMENTS,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_MAX_LINE_BYTES,
            env=environment,
            start_new_session=True,  # the API handles Ctrl-C
        )
        try:
            # Now, while the process has one thread: those that it starts inherit the priority.
            _lower_priority(process.pid, settings.engine_nice)
            start = EngineStart(
                parent=os.getpid(),
                device=settings.engine_device,
                cache_bytes=settings.engine_cache_bytes,
                max_running=settings.engine_max_running,
                log_format=settings.log_format,
                files=self._files,
            )
            await send(process, start)
        except BaseException:
            # Without its first line it would read a request as that: no request may be sent to it.
            _kill(process)
            raise
        self._process, self.is_ready = process, False
        self._reading = asyncio.create_task(self._read(process))
        return process

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Read messages until the process ends, or is killed because it is not ready in time."""
        assert process.stdout is not None
        seconds = self._settings.engine_start_seconds
        too_late = False
        try:
            async with asyncio.timeout(seconds) as start:
                async for line in process.stdout:
                    self._handle(parse_from_engine(line))
                    if self.is_ready:
                        start.reschedule(None)
        except TimeoutError:
            too_late = True
            log.error("generation_engine_not_ready", seconds=seconds)
        except Exception:  # a line that is too long, or no message: what follows it cannot be trusted either
            log.exception("generation_engine_message_invalid")
        finally:
            if not process.stdout.at_eof():
                _kill(process)
                await process.stdout.read()  # unread output would keep the pipe open, and `wait` below waiting
            status = await process.wait()
            ended = f"was not ready after {seconds:g} seconds" if too_late else f"ended with status {status}"
            self._handle_end(status, f"the generation engine {ended}")

    def _handle(self, message: FromEngine) -> None:
        if isinstance(message, EngineReady):
            self.is_ready, self._failures = True, 0
        self._on_message(message)

    def _handle_end(self, status: int, reason: str) -> None:
        if not self._stopped:
            log.warning("generation_engine_ended", status=status, was_ready=self.is_ready)
        code = "engine_restarted" if self.is_ready else "generation_unavailable"
        if not self.is_ready:
            self._failures += 1
            self._start_not_before = time.monotonic() + min(2.0**self._failures, _MAX_SECONDS_BETWEEN_STARTS)
        self._process, self.is_ready = None, False
        self._on_end(Unavailable(code, reason, retry_after=RETRY_SECONDS))


async def send(process: asyncio.subprocess.Process, message: EngineStart | ToEngine) -> None:
    """Send a message; one to a process that has ended is dropped."""
    assert process.stdin is not None
    with contextlib.suppress(ConnectionError):  # the end is noticed, and requests are answered, where it is read
        process.stdin.write(to_line(message))
        await process.stdin.drain()


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        process.kill()


def _lower_priority(pid: int, niceness: int) -> None:
    """Set the niceness of a process that leads its session, unless it has a higher one already.

    Where Linux groups processes by session, a priority counts only within the session, and the session has its own.
    """
    try:
        # Only a privileged process may lower its niceness.
        niceness = max(niceness, os.getpriority(os.PRIO_PROCESS, pid))
        os.setpriority(os.PRIO_PROCESS, pid, niceness)
        session = Path(f"/proc/{pid}/autogroup")
        if session.exists():
            session.write_text(str(niceness))
    except ProcessLookupError:
        return  # it has ended already, which is noticed where it is read
    except OSError as error:  # the kernel allows one change of a session in a tenth of a second
        log.warning("generation_engine_priority_unchanged", reason=str(error))
