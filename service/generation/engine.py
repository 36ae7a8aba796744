"""The generation engine: the API's child process, which keeps checkpoints loaded and continues prompts from them.

`python -m service.generation.engine`, JSON lines on stdin and stdout (`service.generation.messages`), the log on
stderr. The main thread generates; one thread reads requests, another loads checkpoints, one scores and inspects, and on
a CPU one prepares the compiled loops. Texts that begin before they are ready are generated with tensor operations to
their end, because the two may differ in last bits: no request waits for a compiler. The process ends when its parent
does: by signal where the system has it, else at the end of stdin. Knows no job, no database and no HTTP.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import Empty, SimpleQueue
from typing import BinaryIO

import structlog
import tokenizers  # noqa: F401 # imported where a checkpoint is loaded; the first request shall not wait for that
import torch

from nanomoe.generation.engine import FEW_CONTINUATIONS, useful_threads
from nanomoe.logs import configure_logging
from nanomoe.processes import die_with_parent
from nanomoe.store.opening import open_store
from nanomoe.training.execution import find_device
from service.generation import compiled_loops
from service.generation.checkpoint_cache import CheckpointCache
from service.generation.examiner import Examiner
from service.generation.messages import (
    Begun,
    Cancel,
    EngineReady,
    EngineStart,
    Examined,
    Failed,
    FromEngine,
    Generate,
    Question,
    Refused,
    ToEngine,
    parse_to_engine,
    to_line,
)
from service.generation.pacing import Pace
from service.generation.scheduler import Scheduler

log = structlog.get_logger(__name__)

_SWITCH_SECONDS = 0.0005
"""How long the main thread waits for the interpreter's lock where another thread computes in Python. It needs the lock
after every tensor operation, and a token takes a hundred of them."""

_RETRY_SECONDS = 10.0
"""How long a bucket that is out of reach is asked again: other checkpoints wait to be loaded, clients for a text."""


class Server:
    """The main thread's work, and the threads that hand it more."""

    def __init__(self, start: EngineStart, output: BinaryIO) -> None:
        self._device = find_device(start.device)
        self._output = output
        self._unsent: list[bytes] = []
        self._n_threads = torch.get_num_threads()
        self._pace = Pace()
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        """What the other threads want done in the main one."""
        self._examiner = ThreadPoolExecutor(1, thread_name_prefix="examiner")
        open_folder = partial(open_store, cache=start.files, retry_seconds=_RETRY_SECONDS)
        self._answer = Examiner(self._device, open_folder).answer
        self._questions: dict[int, Future[Examined | Refused | Failed]] = {}
        """Questions that wait for the examiner or are being answered, by id."""
        self._cache = CheckpointCache(
            self._device,
            open_folder,
            max_bytes=start.cache_bytes,
            max_running=start.max_running,
            in_main_thread=self._inbox.put,
            on_failure=lambda sha256, failure: self._scheduler.fail_waiting(sha256, failure),
        )
        self._scheduler = Scheduler(self._cache, self._send, max_running=start.max_running)

    def receive(self, message: ToEngine) -> None:
        """Take a message, in any thread."""
        match message:
            case Cancel():
                self._inbox.put(lambda: self._cancel(message.id))
            case Generate():
                self._inbox.put(lambda: self._scheduler.add(message))
            case _:
                self._inbox.put(lambda: self._ask(message))

    def serve(self) -> None:
        """Generate until the process ends."""
        self._send(EngineReady())
        self._flush()
        self.prepare_loops()
        while True:
            self.turn()

    def prepare_loops(self) -> None:
        """Use compiled loops for requests that begin after they are ready, some time from now. On a GPU there are
        none."""
        if self._device.type == "cpu":
            threading.Thread(target=self._prepare_loops, name="loops", daemon=True).start()

    def _prepare_loops(self) -> None:
        if compiled_loops.prepare():
            self._inbox.put(self._cache.use_loops)

    def turn(self) -> None:
        """Handle what has arrived since the last turn, waiting for it if there is nothing to generate; then add one
        token to every text, and send what is due."""
        self._scheduler.begin_waiting()
        self._cache.replace_those_without_loops()
        # With nothing to generate, the wait below may be long: what was just sent must not lie here until it ends.
        if self._scheduler.is_idle:
            self._flush()
        self._handle_inbox(None if self._scheduler.is_idle else self._pace.pause)
        self._scheduler.begin_waiting()
        self._set_threads()
        with self._pace.step(few=self._scheduler.n_continuations < FEW_CONTINUATIONS):
            self._scheduler.step()
            self._flush()

    def _set_threads(self) -> None:
        wanted = useful_threads(self._scheduler.n_continuations, self._n_threads)
        if wanted != torch.get_num_threads():
            torch.set_num_threads(wanted)

    def _handle_inbox(self, seconds: float | None) -> None:
        """Call everything in the inbox, waiting at most so many seconds for the first; None waits without a limit."""
        try:
            self._inbox.get(timeout=seconds)()
            while True:
                self._inbox.get_nowait()()
        except Empty:
            return

    def _cancel(self, request_id: int) -> None:
        self._scheduler.cancel(request_id)
        question = self._questions.pop(request_id, None)
        if question is not None:
            question.cancel()

    def _ask(self, question: Question) -> None:
        """Have the examiner's thread answer, after the questions that it was asked before."""

        def answer() -> Examined | Refused | Failed:
            self._inbox.put(lambda: self._send(Begun(id=question.id, at=time.monotonic())))
            return self._answer(question)

        self._questions[question.id] = self._examiner.submit(answer)
        self._questions[question.id].add_done_callback(
            lambda done: self._inbox.put(lambda: self._send_answer(question.id, done))
        )

    def _send_answer(self, question_id: int, done: Future[Examined | Refused | Failed]) -> None:
        if self._questions.pop(question_id, None) is not None:  # else it was cancelled
            self._send(done.result())

    def _send(self, message: FromEngine) -> None:
        """Send a message with the next flush."""
        self._unsent.append(to_line(message))

    def _flush(self) -> None:
        if self._unsent:
            self._output.write(b"".join(self._unsent))
            self._output.flush()
            self._unsent.clear()


def _read_requests(lines: BinaryIO, server: Server) -> None:
    """Read until stdin ends, and end the process then: the main thread may be in the middle of a long step."""
    try:
        for line in lines:
            server.receive(parse_to_engine(line))
    except BaseException:  # a line that the API does not write: what follows it cannot be trusted either
        log.exception("request_invalid")
        os._exit(1)
    os._exit(0)  # the API has closed the pipe, or has ended


def main() -> None:
    """Serve until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the API handles Ctrl-C
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up between the messages
    start = EngineStart.model_validate_json(sys.stdin.buffer.readline())
    configure_logging(start.log_format)
    die_with_parent(start.parent)
    sys.setswitchinterval(_SWITCH_SECONDS)
    server = Server(start, output)
    threading.Thread(target=_read_requests, args=(sys.stdin.buffer, server), daemon=True).start()
    try:
        server.serve()
    except BaseException:
        log.exception("generation_engine_failed")
        os._exit(1)  # not a return: the thread that reads stdin cannot be stopped


if __name__ == "__main__":
    main()
