"""The API's side of generation: admission, streams, and the engine process that does the work.

The engine is started by `preload`, or when the first request needs it, and again when it dies; requests of that moment
are answered 503. How long a request may wait counts from when the engine is ready, which has a limit of its own: an
engine that is not ready by then is killed. A request that nobody reads any more is cancelled, which frees its slot.
Never imports torch.
"""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from nanomoe.checkpoint import CheckpointDamaged
from service.errors import Conflict, Invalid, ServiceError, TooManyRequests, Unavailable
from service.generation.messages import (
    Begun,
    Cancel,
    Chunk,
    Done,
    EngineRequest,
    Examined,
    Failed,
    FinishReason,
    FromEngine,
    Generate,
    Inspect,
    Inspected,
    LogProbs,
    PromptsRead,
    PromptToken,
    Question,
    ReadPrompts,
    Ready,
    Refused,
    Score,
    Scored,
    Start,
    ToEngine,
    parse_from_engine,
    to_line,
)
from service.http.instruments import GenerationInstruments
from service.settings import Settings

log = structlog.get_logger(__name__)

_ENGINE = ("-m", "service.generation.engine")
_LONGEST_LINE = 256 * 2**20
_STOP_SECONDS = 3.0
_MOST_SECONDS_BETWEEN_STARTS = 30.0
_RETRY_SECONDS = 2.0
"""What a client that was turned away is told to wait."""


@dataclass(frozen=True)
class Timing:
    """How long a request took."""

    queue_seconds: float
    """From its arrival to its first step in the engine."""

    first_token_seconds: float
    """From its arrival to its first token."""

    tok_per_sec: float | None
    """New tokens a second from the first step to the last, over all continuations."""


@dataclass(frozen=True)
class Summary:
    """What is known of a request at its end; a stream's last item."""

    prompt_tokens: int
    completion_tokens: int
    window_slid: bool
    """Whether the context grew past `block_size`, so that its oldest tokens were forgotten."""

    numerics: str
    """How tokens were computed, in words."""

    timing: Timing


@dataclass(frozen=True)
class EngineChoice:
    """One finished continuation."""

    index: int
    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[LogProbs, ...] | None


@dataclass(frozen=True)
class EngineResult:
    """A finished request."""

    choices: tuple[EngineChoice, ...]
    summary: Summary


Answer = Chunk | Done | Examined | ServiceError
"""What happens to a request once it has begun."""


def empty_prompt(*place: int) -> Invalid:
    """The refusal of a prompt without a token; `place`: its number, where there are several."""
    return Invalid(
        "empty_prompt",
        "the prompt is empty, and there is nothing to begin from instead: these models learn what follows a token, "
        "and have no token that stands for the start of a text; begin with a word, or with a line break",
        errors=[{"loc": ["body", "prompt", *place], "msg": "must not be empty"}],
    )


class _Pending:
    """A request that was not answered in full yet."""

    def __init__(self, n: int, *, follows: bool = False) -> None:
        self.n = n
        """Continuations; 0 is a question."""
        self.follows = follows
        """Whether it belongs to a request of several prompts of which one came before."""
        self.arrived_at = time.monotonic()
        self.waits_since: float | None = None
        """From when its time limits count; None while the engine is not ready."""
        self.begun_at: float | None = None
        self.answers: asyncio.Queue[Answer | None] = asyncio.Queue()
        """None: the engine has become ready, or the request has begun."""
        self.finished = False
        """Whether the engine has nothing more to say of it."""
        self.failed = False

    @property
    def outcome(self) -> str:
        """How it ended, for who counts: `cancelled` is a client that left."""
        return "failed" if self.failed else "finished" if self.finished else "cancelled"


class Generation:
    """Continues prompts, in the engine process. One for an API; its methods belong to the API's event loop."""

    def __init__(self, settings: Settings) -> None:
        self.instruments = GenerationInstruments()
        self.instruments.waiting.set_function(lambda: self.n_waiting)
        self.instruments.running.set_function(lambda: self.n_running)
        self._settings = settings
        self._pending: dict[int, _Pending] = {}
        self._last_id = 0
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None
        self._ready = False
        self._failures = 0
        """Ends of the engine in a row before it was ready."""
        self._start_not_before = 0.0
        self._starting = asyncio.Lock()
        self._closed = False

    async def preload(self) -> None:
        """Start the engine before anybody asks; who asks meanwhile waits for the same one.

        Raises:
            Unavailable: it cannot be started now.
        """
        async with self._starting:
            if self._process is None:
                await self._start_engine()

    async def stop(self) -> None:
        """End the engine; what is being generated is answered 503."""
        self._closed = True
        process, listening = self._process, self._listening
        if process is None or listening is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await asyncio.shield(listening)
        except TimeoutError:
            _kill(process)
            await listening

    @property
    def n_waiting(self) -> int:
        """Requests that have not begun."""
        return sum(pending.begun_at is None for pending in self._pending.values())

    @property
    def n_running(self) -> int:
        """Requests that are being generated."""
        return len(self._pending) - self.n_waiting

    async def generate(self, request: EngineRequest) -> EngineResult:
        """All continuations of a request, finished. Raises as `stream` does."""
        texts = [""] * request.n
        tokens: list[list[int]] = [[] for _ in range(request.n)]
        logprobs: list[list[LogProbs]] = [[] for _ in range(request.n)]
        reasons: list[FinishReason] = ["length"] * request.n
        summary: Summary | None = None
        async with contextlib.aclosing(self.stream(request, in_chunks=False)) as items:
            async for item in items:
                if isinstance(item, Summary):
                    summary = item
                    continue
                texts[item.index] += item.text
                tokens[item.index] += item.tokens
                logprobs[item.index] += item.logprobs or ()
                reasons[item.index] = item.finish_reason or "length"
        assert summary is not None, "a stream ends with its summary"
        choices = tuple(
            EngineChoice(
                index=index,
                text=texts[index],
                tokens=tuple(tokens[index]),
                finish_reason=reasons[index],
                logprobs=tuple(logprobs[index]) if request.logprobs is not None else None,
            )
            for index in range(request.n)
        )
        return EngineResult(choices, summary)

    async def stream(
        self, request: EngineRequest, *, in_chunks: bool = True, follows: bool = False
    ) -> AsyncGenerator[Chunk | Summary]:
        """What the continuations gain, as it comes; at last the summary. Closing the generator cancels the request.

        `in_chunks`: whether a continuation is wanted in pieces, or whole at its end. `follows`: whether it belongs to a
        request of several prompts of which one was admitted; it may wait for its turn without being turned away.

        Raises:
            Invalid: the prompt is empty, or more tokens or continuations are wanted than the settings allow.
            TooManyRequests: too many requests wait.
            Conflict: `checkpoint_damaged`.
            Unavailable: the engine died or cannot start, the checkpoint makes no model, or a time limit was reached.
        """
        self._check_limits(request)
        if not follows:
            self._check_room(request.n)
        asking = self._asking(request.n, lambda i: Generate(id=i, stream=in_chunks, request=request), follows=follows)
        async with asking as pending:
            while not pending.finished:
                answer = await self._next_answer(pending)
                if isinstance(answer, Chunk):
                    yield answer
                elif isinstance(answer, Done):
                    pending.finished = True
                    summary = _summary(pending, answer)
                    self._count(summary, answer)
                    yield summary
                elif isinstance(answer, ServiceError):
                    pending.finished = True
                    raise answer

    async def score(self, folder: str, manifest_sha256: str, text: str) -> Scored:
        """The loss of each token of a text under the checkpoint in `folder`. Raises as `stream` does."""
        answer = await self._examine(lambda i: Score(id=i, folder=folder, manifest_sha256=manifest_sha256, text=text))
        assert isinstance(answer, Scored)
        return answer

    async def inspect(self, folder: str, manifest_sha256: str, prompt: str, *, attention: bool = True) -> Inspected:
        """What the checkpoint in `folder` does with a prompt, and its attention if wanted. Raises as `stream` does."""
        if not prompt:
            raise empty_prompt()
        answer = await self._examine(
            lambda i: Inspect(id=i, folder=folder, manifest_sha256=manifest_sha256, prompt=prompt, attention=attention)
        )
        assert isinstance(answer, Inspected)
        return answer

    async def read_prompts(
        self, folder: str, manifest_sha256: str, prompts: Sequence[str | Sequence[int]], logprobs: int | None
    ) -> tuple[tuple[PromptToken, ...], ...]:
        """The tokens of each prompt, and how likely the checkpoint in `folder` finds them: beside each token so many
        `logprobs` of the likeliest, or nothing for None. Raises as `stream` does."""
        given = tuple(prompt if isinstance(prompt, str) else tuple(prompt) for prompt in prompts)
        answer = await self._examine(
            lambda i: ReadPrompts(
                id=i, folder=folder, manifest_sha256=manifest_sha256, prompts=given, logprobs=logprobs
            )
        )
        assert isinstance(answer, PromptsRead)
        return answer.prompts

    async def _examine(self, question: Callable[[int], Question]) -> Examined:
        self._check_room(0)
        async with self._asking(0, question) as pending:
            while True:
                answer = await self._next_answer(pending)
                if answer is None:
                    continue
                pending.finished = True
                if isinstance(answer, ServiceError):
                    raise answer
                assert isinstance(answer, Examined), "a question is not answered with text"
                return answer

    def _count(self, summary: Summary, done: Done) -> None:
        self.instruments.tokens.labels("prompt").inc(summary.prompt_tokens)
        self.instruments.tokens.labels("completion").inc(summary.completion_tokens)
        self.instruments.first_token_seconds.observe(summary.timing.first_token_seconds)
        self.instruments.cached.set(done.n_cached)
        self.instruments.cache_bytes.set(done.cache_bytes)

    @contextlib.asynccontextmanager
    async def _asking(
        self, n: int, message: Callable[[int], ToEngine], *, follows: bool = False
    ) -> AsyncIterator[_Pending]:
        """Send the engine a message with an id of its own; cancel it, unless it is finished when the block ends.

        `n`: its continuations; 0 for a question. `follows`: as for `stream`.
        """
        self._last_id += 1
        request_id = self._last_id
        pending = self._pending[request_id] = _Pending(n, follows=follows)
        if self._ready:
            pending.waits_since = pending.arrived_at
        process: asyncio.subprocess.Process | None = None
        try:
            async with self._starting:
                process = self._process or await self._start_engine()
            await self._send(process, message(request_id))
            yield pending
        except ServiceError:
            pending.failed = True
            raise
        finally:
            del self._pending[request_id]
            self.instruments.requests.labels(pending.outcome).inc()
            if not pending.finished and process is not None:
                await self._send(process, Cancel(id=request_id))

    # Admission

    def _check_limits(self, request: EngineRequest) -> None:
        settings = self._settings
        if not request.prompt:
            raise empty_prompt()
        if request.max_new_tokens > settings.engine_max_new_tokens:
            raise Invalid(
                "max_new_tokens_too_large",
                f"max_new_tokens is {request.max_new_tokens}; this server's limit is {settings.engine_max_new_tokens}",
                errors=[{"loc": ["body", "max_new_tokens"], "msg": "above the server's limit"}],
            )
        if request.n > settings.engine_max_running:
            raise Invalid(
                "n_too_large",
                f"n is {request.n}; this server's limit is {settings.engine_max_running}",
                errors=[{"loc": ["body", "n"], "msg": "above the server's limit"}],
            )

    def _check_room(self, n: int) -> None:
        """Refuse a request of `n` continuations, 0 for a question, if it would wait, and as many as may do already.

        What came before it takes places in the order of its arrival: continuations as many as run at the same time,
        and one question. Who finds none is behind.
        """
        n_sequences = n_questions = n_behind = 0
        is_behind = False
        for size in (*(pending.n for pending in self._pending.values()), n):
            n_sequences += size
            n_questions += size == 0
            is_behind = n_sequences > self._settings.engine_max_running if size else n_questions > 1
            n_behind += is_behind
        if is_behind and n_behind > self._settings.engine_max_waiting:
            raise TooManyRequests(
                "generation_queue_full",
                f"{n_behind - 1} generation requests are waiting already",
                retry_after=_RETRY_SECONDS,
            )

    async def _next_answer(self, pending: _Pending) -> Answer | None:
        """The next thing that happens to a request; running out of time is one."""
        settings = self._settings
        begun = pending.begun_at is not None
        patient = begun or pending.follows
        limit = settings.engine_request_seconds if patient else settings.engine_wait_seconds
        try:
            # An engine that is not ready becomes so, or is killed, which is an answer too.
            async with asyncio.timeout_at(None if pending.waits_since is None else pending.waits_since + limit):
                return await pending.answers.get()
        except TimeoutError:
            if begun:
                raise Unavailable("generation_timeout", f"not finished after {limit:g} seconds") from None
            raise Unavailable(
                "generation_wait_too_long", f"not begun after {limit:g} seconds", retry_after=_RETRY_SECONDS
            ) from None

    # The engine

    async def _start_engine(self) -> asyncio.subprocess.Process:
        if self._closed:
            raise Unavailable("generation_unavailable", "the service is stopping", retry_after=_RETRY_SECONDS)
        delay = self._start_not_before - time.monotonic()
        if delay > 0:
            raise Unavailable("generation_unavailable", "the generation engine does not start", retry_after=delay)
        settings = self._settings
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        if settings.engine_threads is not None:
            environment["OMP_NUM_THREADS"] = str(settings.engine_threads)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *_ENGINE,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LONGEST_LINE,
            env=environment,
            start_new_session=True,  # Ctrl-C is the API's to answer
        )
        try:
            # Now, while the process has one thread: those that it starts inherit the priority.
            _yield_cpu(process.pid, settings.engine_nice)
            start = Start(
                parent=os.getpid(),
                device=settings.engine_device,
                cache_bytes=settings.engine_cache_bytes,
                max_running=settings.engine_max_running,
                log_format=settings.log_format,
            )
            await self._send(process, start)
        except BaseException:
            # Without its first line it would take a request for it: nobody may find this one.
            _kill(process)
            raise
        self._process, self._ready = process, False
        self._listening = asyncio.create_task(self._listen(process))
        return process

    async def _send(self, process: asyncio.subprocess.Process, message: Start | ToEngine) -> None:
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):  # its end is noticed, and answered, where its answers are read
            process.stdin.write(to_line(message))
            await process.stdin.drain()

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        """Hand the engine's answers to who waits for them, until it ends, or is killed because it is not ready in
        time."""
        assert process.stdout is not None
        seconds = self._settings.engine_start_seconds
        too_late = False
        try:
            async with asyncio.timeout(seconds) as start:
                async for line in process.stdout:
                    self._hand_over(parse_from_engine(line))
                    if self._ready:
                        start.reschedule(None)
        except TimeoutError:
            too_late = True
            log.error("generation_engine_not_ready", seconds=seconds)
        except Exception:  # a line that is too long, or none of ours: what follows it cannot be trusted either
            log.exception("generation_engine_not_understood")
        finally:
            if not process.stdout.at_eof():
                _kill(process)
                await process.stdout.read()  # what nobody reads keeps the pipe open, and the process waited for
            status = await process.wait()
            ended = f"was not ready after {seconds:g} seconds" if too_late else f"ended with status {status}"
            self._forget(status, f"the generation engine {ended}")

    def _hand_over(self, message: FromEngine) -> None:
        if isinstance(message, Ready):
            self._ready, self._failures = True, 0
            now = time.monotonic()
            for waiting in self._pending.values():
                waiting.waits_since = now
                waiting.answers.put_nowait(None)
            return
        pending = self._pending.get(message.id)
        if pending is None:
            return  # cancelled
        if isinstance(message, Begun):
            pending.begun_at = message.at
            pending.answers.put_nowait(None)
        elif isinstance(message, Refused):
            pending.answers.put_nowait(_refusal(message))
        elif isinstance(message, Failed):
            # What was recorded is not there any more, whoever asks again; all else may pass.
            kind = Conflict if message.code == CheckpointDamaged.code else Unavailable
            pending.answers.put_nowait(kind(message.code, message.message))
        else:
            pending.answers.put_nowait(message)

    def _forget(self, status: int, reason: str) -> None:
        """The engine has ended: answer what it leaves behind."""
        if not self._closed:
            log.warning("generation_engine_ended", status=status, requests=len(self._pending), was_ready=self._ready)
        error = Unavailable(
            "engine_restarted" if self._ready else "generation_unavailable",
            reason,
            retry_after=_RETRY_SECONDS,
        )
        if not self._ready:
            self._failures += 1
            self._start_not_before = time.monotonic() + min(2.0**self._failures, _MOST_SECONDS_BETWEEN_STARTS)
        self._process, self._ready = None, False
        self.instruments.cached.set(0)
        self.instruments.cache_bytes.set(0)
        for pending in self._pending.values():
            pending.answers.put_nowait(error)


def _refusal(refused: Refused) -> Invalid:
    errors = [] if refused.place is None else [{"loc": ["body", "prompt", *refused.place], "msg": refused.message}]
    return Invalid(refused.code, refused.message, errors=errors)


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        process.kill()


def _yield_cpu(pid: int, niceness: int) -> None:
    """Let a process that leads its session run behind others; one that does so further already is left alone.

    Where Linux groups processes by session, a priority counts only within the session, and the session has its own.
    """
    try:
        # Only a privileged process may run less far behind than it was started.
        niceness = max(niceness, os.getpriority(os.PRIO_PROCESS, pid))
        os.setpriority(os.PRIO_PROCESS, pid, niceness)
        session = Path(f"/proc/{pid}/autogroup")
        if session.exists():
            session.write_text(str(niceness))
    except ProcessLookupError:
        return  # it has died already, which is noticed where it is read
    except OSError as error:  # of a session, the kernel allows one such change in a tenth of a second
        log.warning("generation_engine_not_niced", reason=str(error))


def _summary(pending: _Pending, done: Done) -> Summary:
    assert pending.begun_at is not None, "a request begins before it is done"
    seconds = done.finished_at - pending.begun_at
    return Summary(
        prompt_tokens=done.prompt_tokens,
        completion_tokens=done.completion_tokens,
        window_slid=done.window_slid,
        numerics=done.numerics,
        timing=Timing(
            queue_seconds=pending.begun_at - pending.arrived_at,
            first_token_seconds=done.first_token_at - pending.arrived_at,
            tok_per_sec=done.completion_tokens / seconds if seconds > 0 else None,
        ),
    )
