"""The API's one child process: it keeps checkpoints loaded, and continues prompts from them for everybody at once.

`python -m service.generation.engine`, JSON lines on stdin and stdout (`service.generation.messages`), the log on
stderr. The main thread generates; one thread reads requests, another loads checkpoints, so that a new one does not stop
the others' texts, one scores and inspects, and on a CPU one makes the compiled loops ready. Until they are, texts are
generated with tensor operations, each to its end, because the two may differ in last bits: nobody waits for a
compiler. The process ends when its parent does: by signal where the system has it, else at the end of stdin. Knows no
job, no database and no HTTP.
"""

import os
import signal
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import BinaryIO

import structlog
import tokenizers  # noqa: F401 # imported where a checkpoint is loaded; the first request shall not wait for that
import torch

from nanomoe import checkpoint
from nanomoe.checkpoint import CheckpointDamaged
from nanomoe.config import SamplingConfig
from nanomoe.generation import engine as generation_engine
from nanomoe.generation.engine import FEW_SEQUENCES, Continuation, Engine, useful_threads
from nanomoe.processes import die_with_parent
from nanomoe.tokenizer import Tokenizer
from nanomoe.training.execution import find_device
from service import logs
from service.generation import compiled_loops
from service.generation.examiner import Examiner, token_logprob, unknown_token
from service.generation.messages import (
    Begun,
    Cancel,
    Chunk,
    Done,
    Examined,
    Failed,
    FinishReason,
    FromEngine,
    Generate,
    LogProbs,
    Question,
    Ready,
    Refused,
    Start,
    ToEngine,
    parse_to_engine,
    to_line,
)
from service.generation.text_stream import TextStream

log = structlog.get_logger(__name__)

CHUNK_SECONDS = 0.02
"""Shortest time between two chunks of a streamed text: a reader sees no difference, and lines cost time."""

_PACE_SECONDS = 0.02
"""Time of steps after which it is judged whether others want the processor."""

_OWN_SHARE = 0.9
"""Share of that time that this thread gets of a processor at least, where nobody else wants it for long: 0.96 and more
on an idle machine, 0.4 to 0.9 beside a training (measured)."""

LEAST_SHARE = 1 / 10
"""Share of a core's time that few texts are generated in where others want the processor: they take no more, and are
never held back below it. It is about what Linux leaves a process of nice 10 beside one of nice 0 on the same core, 110
parts of 1,134. A training beside one text keeps 0.83 of its steps at an eighth and 0.92 at a thirteenth (measured)."""

_MOST_CREDIT = 0.25
"""Seconds of waiting for the processor, at most, that later steps need not pause for."""

_SWITCH_SECONDS = 0.0005
"""How long the main thread waits for the interpreter's lock where another thread computes in Python. It needs the lock
after every tensor operation, and a token takes a hundred of them."""


@dataclass
class Loaded:
    """A checkpoint, ready to be continued from."""

    folder: Path
    engine: Engine
    tokenizer: Tokenizer
    lacks_loops: bool
    """Whether it was loaded before the compiled loops were ready, and has not been loaded anew."""

    n_users: int = 0
    """Requests being generated from it; it stays loaded until there are none."""


@dataclass
class _Choice:
    """One continuation of a request."""

    index: int
    continuation: Continuation
    text: TextStream
    unsent: str = ""
    n_decoded: int = 0
    """Tokens that `text` was given."""

    n_sent: int = 0
    """Tokens that were sent."""

    finish_reason: FinishReason | None = None


@dataclass
class _Running:
    """A request that is being generated."""

    message: Generate
    loaded: Loaded
    n_prompt: int = 0
    choices: list[_Choice] = field(default_factory=list)
    sent_at: float = 0.0
    first_token_at: float | None = None


class Pace:
    """Gives way to who else computes here, a training for instance, while few texts are being generated.

    A low priority alone leaves a training three quarters of its speed (measured): it waits a little at every of its
    many small steps for a core and for the cache. So when the processor keeps this thread waiting, which tells that
    others want it, most of the time is left to them: of a core, this thread takes `LEAST_SHARE`. Where waiting for the
    processor alone takes longer than that, it does not pause on top.
    """

    def __init__(self) -> None:
        self.pause = 0.0
        """Seconds to leave before the next step."""
        self._wall = self._cpu = 0.0
        self._gives_way = False
        self._ended = time.perf_counter()
        self._owed = 0.0
        """Seconds that must pass until this thread has had no more than its share; below 0 where it has had less."""

    @contextmanager
    def working(self, *, alone: bool) -> Iterator[None]:
        """Around a step; `alone`: whether it is of few texts."""
        wall, cpu = time.perf_counter(), time.thread_time()
        yield
        ended, computed = time.perf_counter(), time.thread_time() - cpu
        taken = ended - wall
        self._owed = max(self._owed + computed / LEAST_SHARE - (ended - self._ended), -_MOST_CREDIT)
        self._ended = ended
        self._wall += taken
        self._cpu += computed
        if self._wall >= _PACE_SECONDS:
            self._gives_way = self._cpu < _OWN_SHARE * self._wall
            self._wall = self._cpu = 0.0
        if not (self._gives_way and alone):
            self._owed = min(self._owed, 0.0)  # what was free is not paid for later
        self.pause = max(0.0, self._owed)


class Server:
    """Requests from their arrival to their last line."""

    def __init__(self, start: Start, output: BinaryIO) -> None:
        self._start = start
        self._device = find_device(start.device)
        self._output = output
        self._n_threads = torch.get_num_threads()
        self._pace = Pace()
        self._lines: list[bytes] = []
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        """What the other threads have for the main one to do."""
        self._examiner = ThreadPoolExecutor(1, thread_name_prefix="examiner")
        self._answer = Examiner(self._device).answer
        self._questions: dict[int, Future[Examined | Refused | Failed]] = {}
        """Being answered, or waiting for it."""
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._cache: OrderedDict[str, Loaded] = OrderedDict()
        """By manifest sha256, the least recently used first."""
        self._superseded: list[Loaded] = []
        """No longer in the cache, because they were loaded anew, and still in use."""
        self._loading = False
        self._has_loops = False
        self._queue: deque[Generate] = deque()
        self._running: dict[int, _Running] = {}
        self._owner: dict[Continuation, tuple[_Running, _Choice]] = {}

    def receive(self, message: ToEngine) -> None:
        """Take a message from another thread."""
        match message:
            case Cancel():
                self._inbox.put(lambda: self._cancel(message.id))
            case Generate():
                self._inbox.put(lambda: self._queue.append(message))
            case _:
                self._inbox.put(lambda: self._ask(message))

    def serve(self) -> None:
        """Generate until the process ends."""
        self._say(Ready())
        self._flush()
        self.prepare_loops()
        while True:
            self.turn()

    def prepare_loops(self) -> None:
        """Use compiled loops for what begins after they are ready, some time from now. On a GPU there are none."""
        if self._device.type == "cpu":
            threading.Thread(target=self._prepare_loops, name="loops", daemon=True).start()

    def _prepare_loops(self) -> None:
        if compiled_loops.prepare():
            self._inbox.put(self._use_loops)

    def _use_loops(self) -> None:
        self._has_loops = True

    def turn(self) -> None:
        """Do what was asked for since the last turn, waiting for it if there is nothing else to do; then add one token
        to every text, and send what is due."""
        self._begin_what_fits()
        self._renew()
        # Nothing runs: what waits, waits for a checkpoint that is being read, and what just failed shall be told.
        if not self._running:
            self._flush()
        self._listen(self._pace.pause if self._running else None)
        self._begin_what_fits()
        self._share_threads()
        with self._pace.working(alone=len(self._owner) < FEW_SEQUENCES):
            for loaded in self._in_use():
                with self._sparing_others(loaded):
                    self._step(loaded)
            self._flush()

    def _share_threads(self) -> None:
        wanted = useful_threads(len(self._owner), self._n_threads)
        if wanted != torch.get_num_threads():
            torch.set_num_threads(wanted)

    @property
    def loaded(self) -> list[str]:
        """The manifest sha256 of the checkpoints that are loaded, the least recently used first."""
        return list(self._cache)

    @property
    def n_sequences(self) -> int:
        """Texts that are being generated."""
        return len(self._owner)

    def _listen(self, patience: float | None) -> None:
        """Do what the other threads have asked for; wait so many seconds for it, or as long as it takes."""
        try:
            self._inbox.get(timeout=patience)()
            while True:
                self._inbox.get_nowait()()
        except Empty:
            return

    # Waiting

    def _cancel(self, request_id: int) -> None:
        self._queue = deque(message for message in self._queue if message.id != request_id)
        running = self._running.get(request_id)
        if running is not None:
            self._leave(running)
        question = self._questions.pop(request_id, None)
        if question is not None:
            question.cancel()

    def _begin_what_fits(self) -> None:
        """Begin requests in the order of their arrival, but let none wait for another's checkpoint to load."""
        for message in list(self._queue):
            sha256 = message.request.manifest_sha256
            if sha256 not in self._cache:
                self._load(Path(message.request.folder), sha256)
            elif not self._running or len(self._owner) + message.request.n <= self._start.max_running:
                self._queue.remove(message)
                loaded = self._cache[sha256]
                if refused := unknown_token(message.id, message.request.prompt, loaded.tokenizer):
                    self._say(refused)
                    continue
                running = self._running[message.id] = _Running(message, loaded)
                loaded.n_users += 1
                with self._sparing_others(loaded):
                    self._begin(running)
            else:
                return

    def _begin(self, running: _Running) -> None:
        request, loaded = running.message.request, running.loaded
        self._cache.move_to_end(request.manifest_sha256)
        prompt = request.prompt
        if isinstance(prompt, str):
            prompt = tuple(loaded.tokenizer.encode(prompt))
        running.n_prompt = len(prompt)
        sampling = SamplingConfig(temperature=request.temperature, top_k=request.top_k, top_p=request.top_p)
        for index in range(request.n):
            continuation = loaded.engine.submit(
                generation_engine.Request(
                    prompt, request.max_new_tokens, sampling, request.seed, index, request.logprobs
                )
            )
            choice = _Choice(index, continuation, TextStream(loaded.tokenizer, request.stop))
            running.choices.append(choice)
            self._owner[continuation] = (running, choice)
        self._say(Begun(id=running.message.id, at=time.monotonic()))

    # Questions

    def _ask(self, question: Question) -> None:
        """Let the examiner's thread answer, after what it was asked before."""

        def answer() -> Examined | Refused | Failed:
            self._inbox.put(lambda: self._say(Begun(id=question.id, at=time.monotonic())))
            return self._answer(question)

        self._questions[question.id] = self._examiner.submit(answer)
        self._questions[question.id].add_done_callback(
            lambda done: self._inbox.put(lambda: self._tell(question.id, done))
        )

    def _tell(self, question_id: int, done: Future[Examined | Refused | Failed]) -> None:
        if self._questions.pop(question_id, None) is not None:  # else nobody waits any more
            self._say(done.result())

    # Checkpoints

    def _in_use(self) -> list[Loaded]:
        """The checkpoints that texts are being generated from."""
        return [loaded for loaded in [*self._cache.values(), *self._superseded] if loaded.n_users]

    def _load(self, folder: Path, sha256: str) -> bool:
        """Let the loader's thread read a checkpoint; whether it does: not while it is busy or those in use leave no
        room."""
        in_use = sum(loaded.engine.n_bytes for loaded in self._in_use())
        if self._loading or in_use >= self._start.cache_bytes:
            return False
        self._loading = True
        loading = self._loader.submit(self._read, folder, sha256, with_loops=self._has_loops)
        loading.add_done_callback(lambda done: self._inbox.put(lambda: self._keep(sha256, done.result())))
        return True

    def _renew(self) -> None:
        """Load one checkpoint anew, if there is one that was loaded before the loops were ready. What is generated from
        it meanwhile is generated without them to its end."""
        if self._has_loops:
            for sha256, loaded in list(self._cache.items()):
                if loaded.lacks_loops and self._load(loaded.folder, sha256):
                    loaded.lacks_loops = False  # if it cannot be read any more, it stays as it is

    def _read(self, folder: Path, sha256: str, *, with_loops: bool) -> Loaded | tuple[str, str]:
        """A checkpoint from the disk, every byte that is used verified; or the code and message of what is wrong."""
        try:
            opened = checkpoint.open(folder, sha256)
            tokenizer = opened.tokenizer()
            engine = Engine(
                opened.weights(),
                opened.config(),
                device=self._device,
                max_running=self._start.max_running,
                cache_bytes=self._start.cache_bytes // 4,
                compiled=with_loops or self._device.type != "cpu",
            )
            if tokenizer.vocab_size != engine.vocab_size:
                raise ValueError(f"{tokenizer.vocab_size} tokens for {engine.vocab_size} embeddings")
            return Loaded(folder, engine, tokenizer, lacks_loops=self._device.type == "cpu" and not with_loops)
        except CheckpointDamaged as error:
            return error.code, str(error)
        except Exception as error:  # whatever is wrong with one checkpoint is its requests' answer, not everybody's
            log.exception("checkpoint_unreadable", folder=str(folder))
            return "checkpoint_unreadable", f"{folder.name}: {type(error).__name__}: {error}"

    def _keep(self, sha256: str, read: Loaded | tuple[str, str]) -> None:
        self._loading = False
        if isinstance(read, Loaded):
            before = self._cache.get(sha256)
            if before is not None and before.n_users:
                self._superseded.append(before)
            self._cache[sha256] = read
            self._evict()
            return
        code, message = read
        for waiting in [waiting for waiting in self._queue if waiting.request.manifest_sha256 == sha256]:
            self._queue.remove(waiting)
            self._say(Failed(id=waiting.id, code=code, message=message))

    def _evict(self) -> None:
        """Drop what was not used for longest until the rest fits, but neither the newest nor what is in use."""
        total = sum(loaded.engine.n_bytes for loaded in self._cache.values())
        for sha256, loaded in list(self._cache.items())[:-1]:
            if total > self._start.cache_bytes and not loaded.n_users:
                total -= loaded.engine.n_bytes
                del self._cache[sha256]

    @contextmanager
    def _sparing_others(self, loaded: Loaded) -> Iterator[None]:
        """Around work on one checkpoint: what goes wrong there ends the requests that it was generating, and nobody
        else's. It is loaded anew for whoever comes next, because its engine may have been left in any state."""
        try:
            yield
        except torch.AcceleratorError:
            raise  # the device answers this process no more: the next one finds it new
        except Exception as error:
            log.exception("generation_failed")
            self._drop(loaded, f"{type(error).__name__}: {error}")

    def _drop(self, loaded: Loaded, reason: str) -> None:
        """Forget a checkpoint; what was being generated from it has failed."""
        self._cache = OrderedDict((sha256, kept) for sha256, kept in self._cache.items() if kept is not loaded)
        self._superseded = [kept for kept in self._superseded if kept is not loaded]
        for running in [running for running in self._running.values() if running.loaded is loaded]:
            for choice in running.choices:
                self._owner.pop(choice.continuation, None)
            del self._running[running.message.id]
            self._say(Failed(id=running.message.id, code="generation_failed", message=reason))

    # Generating

    def _step(self, loaded: Loaded) -> None:
        """One token for every sequence of one checkpoint."""
        touched: dict[int, _Running] = {}
        for continuation in loaded.engine.step():
            running, choice = self._owner[continuation]
            touched[running.message.id] = running
            if choice.text.has_stops:
                self._decode(choice)
            if choice.text.stopped:
                choice.finish_reason = "stop"
            elif continuation.finished:
                choice.finish_reason = "length"
        now = time.monotonic()
        for running in touched.values():
            if running.first_token_at is None:
                running.first_token_at = now
            due = running.message.stream and now - running.sent_at >= CHUNK_SECONDS
            for choice in running.choices:
                if due or choice.finish_reason is not None:
                    self._send(running, choice)
            if due:
                running.sent_at = now
            if all(choice.finish_reason is not None for choice in running.choices):
                self._finish(running, now)

    def _decode(self, choice: _Choice) -> None:
        new = choice.continuation.new
        choice.unsent += choice.text.push(new[choice.n_decoded :])
        choice.n_decoded = len(new)

    def _send(self, running: _Running, choice: _Choice) -> None:
        """A chunk of what a continuation has gained, unless that is nothing."""
        if choice.continuation not in self._owner:
            return  # its last chunk was sent
        self._decode(choice)
        if choice.finish_reason is not None:
            choice.unsent += choice.text.finish()
            if choice.text.stopped:
                choice.finish_reason = "stop"
            self._release(running, choice)
        begun = range(choice.n_sent, choice.text.n_begun)
        if not (begun or choice.unsent or choice.finish_reason):
            return
        logprobs = None
        if running.message.request.logprobs is not None:
            logprobs = tuple(self._logprobs(running, choice, n) for n in begun)
        self._say(
            Chunk(
                id=running.message.id,
                index=choice.index,
                text=choice.unsent,
                tokens=tuple(choice.continuation.new[begun.start : begun.stop]),
                logprobs=logprobs,
                finish_reason=choice.finish_reason,
            )
        )
        choice.unsent, choice.n_sent = "", begun.stop

    def _logprobs(self, running: _Running, choice: _Choice, n: int) -> LogProbs:
        tokenizer, found = running.loaded.tokenizer, choice.continuation.logprobs[n]
        return LogProbs(
            chosen=token_logprob(tokenizer, found.chosen),
            likeliest=tuple(token_logprob(tokenizer, one) for one in found.likeliest),
        )

    def _finish(self, running: _Running, now: float) -> None:
        assert running.first_token_at is not None
        continuations = [choice.continuation for choice in running.choices]
        self._say(
            Done(
                id=running.message.id,
                prompt_tokens=running.n_prompt,
                completion_tokens=sum(len(continuation.new) for continuation in continuations),
                window_slid=any(continuation.window_slid for continuation in continuations),
                numerics=running.loaded.engine.numerics,
                first_token_at=running.first_token_at,
                finished_at=now,
                n_cached=len(self._cache),
                cache_bytes=sum(loaded.engine.n_bytes for loaded in self._cache.values()),
            )
        )
        self._leave(running)

    def _release(self, running: _Running, choice: _Choice) -> None:
        """Give a continuation's slot back, if it still has one."""
        if self._owner.pop(choice.continuation, None) is not None and not choice.continuation.finished:
            running.loaded.engine.cancel(choice.continuation)

    def _leave(self, running: _Running) -> None:
        for choice in running.choices:
            self._release(running, choice)
        del self._running[running.message.id]
        running.loaded.n_users -= 1
        self._superseded = [loaded for loaded in self._superseded if loaded.n_users]
        self._evict()

    # Answers

    def _say(self, message: FromEngine) -> None:
        self._lines.append(to_line(message))

    def _flush(self) -> None:
        if self._lines:
            self._output.write(b"".join(self._lines))
            self._output.flush()
            self._lines.clear()


def _read_requests(lines: BinaryIO, server: Server) -> None:
    """Until stdin ends, and the process with it: the main thread may be in the middle of a long step."""
    try:
        for line in lines:
            server.receive(parse_to_engine(line))
    except BaseException:  # a line that is none of the API's: what follows it cannot be trusted either
        log.exception("request_not_understood")
        os._exit(1)
    os._exit(0)  # the API has closed the pipe, or is gone


def main() -> None:
    """Serve until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the API's to answer
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not break the lines
    start = Start.model_validate_json(sys.stdin.buffer.readline())
    logs.configure(start.log_format)
    die_with_parent(start.parent)
    sys.setswitchinterval(_SWITCH_SECONDS)
    server = Server(start, output)
    threading.Thread(target=_read_requests, args=(sys.stdin.buffer, server), daemon=True).start()
    try:
        server.serve()
    except BaseException:
        log.exception("generation_engine_died")
        os._exit(1)  # not a return: the thread that reads stdin cannot be stopped


if __name__ == "__main__":
    main()
