"""The API's side of generation: which requests are admitted, for how long they may wait, and their answers.

The engine is started by `preload`, or when the first request needs it, and again after it has ended; the requests of
that moment are answered 503. How long a request may wait counts from when the engine is ready. A request whose client
has disconnected is cancelled, which frees its place. Never imports torch.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import structlog

from nanomoe.checkpoint import CheckpointDamaged
from nanomoe.store.cache import CacheAddress
from service.errors import Conflict, Invalid, ServiceError, TooManyRequests, Unavailable
from service.generation.answers import FinishReason, Timing
from service.generation.engine_process import RETRY_SECONDS, EngineProcess, send
from service.generation.instruments import GenerationInstruments
from service.generation.messages import (
    Begun,
    Cancel,
    Chunk,
    EngineDone,
    EngineReady,
    EngineRequest,
    Examined,
    Failed,
    FromEngine,
    Generate,
    Inspect,
    Inspected,
    LogProbsWithBytes,
    PromptsRead,
    PromptTokenLogProbs,
    Question,
    ReadPrompts,
    Refused,
    Score,
    Scored,
    ToEngine,
)
from service.settings import Settings

log = structlog.get_logger(__name__)


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
    logprobs: tuple[LogProbsWithBytes, ...] | None


@dataclass(frozen=True)
class EngineResult:
    """A finished request."""

    choices: tuple[EngineChoice, ...]
    summary: Summary


Answer = Chunk | EngineDone | Examined | ServiceError
"""What happens to a request once it has begun."""


def empty_prompt(*place: int) -> Invalid:
    """The refusal of a prompt without a token; `place`: its number, where there are several."""
    return Invalid(
        "empty_prompt",
        "the prompt is empty, and there is nothing to begin from instead: these models learn what follows a token, "
        "and have no token that stands for the start of a text; begin with a word, or with a line break",
        errors=[{"loc": ["body", "prompt", *place], "msg": "must not be empty"}],
    )


@dataclass(frozen=True)
class _Load:
    """What a request takes of the engine's capacity: some continuations, or one question."""

    n_continuations: int = 0
    n_questions: int = 0


_QUESTION = _Load(n_questions=1)


class _TimeLimitChanged:
    """The engine has become ready, or the request has begun: another time limit counts now."""


class _Pending:
    """A request that has not been answered in full yet."""

    def __init__(self, load: _Load, *, follows: bool = False) -> None:
        self.load = load
        self.follows = follows
        """Whether it belongs to a request of several prompts or checkpoints of which one came before."""
        self.arrived_at = time.monotonic()
        self.waits_since: float | None = None
        """From when its time limits count; None while the engine is not ready."""
        self.begun_at: float | None = None
        self.answers: asyncio.Queue[Answer | _TimeLimitChanged] = asyncio.Queue()
        self.finished = False
        """Whether the engine sends no more messages about it."""
        self.failed = False

    @property
    def outcome(self) -> str:
        """How it ended, as it is counted: `cancelled` is a client that disconnected."""
        return "failed" if self.failed else "finished" if self.finished else "cancelled"


class Generation:
    """Continues prompts, in the engine process. One for an API; its methods belong to the API's event loop."""

    def __init__(self, settings: Settings, files: CacheAddress | None = None) -> None:
        """`files`: where the engine keeps files of a bucket that it has read."""
        self.instruments = GenerationInstruments()
        self.instruments.waiting.set_function(lambda: self.n_waiting)
        self.instruments.running.set_function(lambda: self.n_running)
        self._settings = settings
        self._engine = EngineProcess(settings, files, on_message=self._handle, on_end=self._handle_end)
        self._pending: dict[int, _Pending] = {}
        self._last_id = 0

    async def preload(self) -> None:
        """Start the engine before the first request; requests that come meanwhile wait for the same one.

        Raises:
            Unavailable: it cannot be started now.
        """
        await self._engine.running()

    async def stop(self) -> None:
        """End the engine; what is being generated is answered 503."""
        await self._engine.stop()

    @property
    def n_waiting(self) -> int:
        """Requests that have not begun."""
        return sum(pending.begun_at is None for pending in self._pending.values())

    @property
    def n_running(self) -> int:
        """Requests that are being generated."""
        return len(self._pending) - self.n_waiting

    # Requests

    async def generate(self, request: EngineRequest, *, follows: bool = False) -> EngineResult:
        """All continuations of a request, finished. `follows`, and what is raised, as for `stream`."""
        texts = [""] * request.n
        tokens: list[list[int]] = [[] for _ in range(request.n)]
        logprobs: list[list[LogProbsWithBytes]] = [[] for _ in range(request.n)]
        reasons: list[FinishReason] = ["length"] * request.n
        summary: Summary | None = None
        async with contextlib.aclosing(self.stream(request, in_chunks=False, follows=follows)) as items:
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
        """What the continuations gain, as it comes, and at the end the summary. Closing the generator cancels the
        request.

        `in_chunks`: whether a continuation is wanted in pieces, or in one at its end. `follows`: whether it belongs to
        a request of several prompts or checkpoints of which one was admitted: it is not refused for want of room, and
        may wait longer.

        Raises:
            Invalid: the prompt is empty, or more tokens or continuations are wanted than the settings allow.
            TooManyRequests: too many requests wait.
            Conflict: `checkpoint_damaged`.
            Unavailable: the engine ended or cannot start, the checkpoint makes no model or cannot be read now, or a
                time limit was reached.
        """
        self._check_limits(request)
        load = _Load(n_continuations=request.n)
        if not follows:
            self._check_room(load)
        sent = self._sent(load, lambda i: Generate(id=i, stream=in_chunks, request=request), follows=follows)
        async with sent as pending:
            while not pending.finished:
                answer = await self._next_answer(pending)
                if isinstance(answer, Chunk):
                    yield answer
                elif isinstance(answer, EngineDone):
                    pending.finished = True
                    summary = _summary(pending, answer)
                    self._count(summary, answer)
                    yield summary
                elif isinstance(answer, ServiceError):
                    pending.finished = True
                    raise answer

    async def score(self, folder: str, manifest_sha256: str, text: str) -> Scored:
        """The loss of each token of a text under the checkpoint in `folder`. Raises what `stream` raises."""
        answer = await self._examine(lambda i: Score(id=i, folder=folder, manifest_sha256=manifest_sha256, text=text))
        assert isinstance(answer, Scored)
        return answer

    async def inspect(self, folder: str, manifest_sha256: str, prompt: str, *, attention: bool = True) -> Inspected:
        """Next tokens, routing and, if wanted, attention of the checkpoint in `folder` at a prompt. Raises what
        `stream` raises."""
        if not prompt:
            raise empty_prompt()
        answer = await self._examine(
            lambda i: Inspect(id=i, folder=folder, manifest_sha256=manifest_sha256, prompt=prompt, attention=attention)
        )
        assert isinstance(answer, Inspected)
        return answer

    async def read_prompts(
        self, folder: str, manifest_sha256: str, prompts: Sequence[str | Sequence[int]], logprobs: int | None
    ) -> tuple[tuple[PromptTokenLogProbs, ...], ...]:
        """The tokens of each prompt, with their log-probabilities under the checkpoint in `folder` and as many of the
        likeliest tokens beside each as `logprobs` says; without log-probabilities where that is None. Raises what
        `stream` raises."""
        given = tuple(prompt if isinstance(prompt, str) else tuple(prompt) for prompt in prompts)
        answer = await self._examine(
            lambda i: ReadPrompts(
                id=i, folder=folder, manifest_sha256=manifest_sha256, prompts=given, logprobs=logprobs
            )
        )
        assert isinstance(answer, PromptsRead)
        return answer.prompts

    async def _examine(self, question: Callable[[int], Question]) -> Examined:
        self._check_room(_QUESTION)
        async with self._sent(_QUESTION, question) as pending:
            while True:
                answer = await self._next_answer(pending)
                if isinstance(answer, _TimeLimitChanged):
                    continue
                pending.finished = True
                if isinstance(answer, ServiceError):
                    raise answer
                assert isinstance(answer, Examined), "a question is not answered with text"
                return answer

    def _count(self, summary: Summary, done: EngineDone) -> None:
        self.instruments.tokens.labels("prompt").inc(summary.prompt_tokens)
        self.instruments.tokens.labels("completion").inc(summary.completion_tokens)
        self.instruments.first_token_seconds.observe(summary.timing.first_token_seconds)
        self.instruments.cached.set(done.n_cached)
        self.instruments.cache_bytes.set(done.cache_bytes)

    @contextlib.asynccontextmanager
    async def _sent(
        self, load: _Load, message: Callable[[int], ToEngine], *, follows: bool = False
    ) -> AsyncIterator[_Pending]:
        """Send the engine a message with a new id; cancel it, unless it is finished when the block ends.

        `load`: what it takes of the engine's capacity. `follows`: as for `stream`.
        """
        self._last_id += 1
        request_id = self._last_id
        pending = self._pending[request_id] = _Pending(load, follows=follows)
        if self._engine.is_ready:
            pending.waits_since = pending.arrived_at
        process: asyncio.subprocess.Process | None = None
        try:
            process = await self._engine.running()
            await send(process, message(request_id))
            yield pending
        except ServiceError:
            pending.failed = True
            raise
        finally:
            del self._pending[request_id]
            self.instruments.requests.labels(pending.outcome).inc()
            if not pending.finished and process is not None:
                await send(process, Cancel(id=request_id))

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

    def _check_room(self, load: _Load) -> None:
        """Refuse a request if it would wait and the queue is full.

        Requests take places in the order of their arrival: as many continuations as may run at the same time, and one
        question. A request without a place waits.
        """
        n_continuations = n_questions = n_waiting = 0
        would_wait = False
        for each in (*(pending.load for pending in self._pending.values()), load):
            n_continuations += each.n_continuations
            n_questions += each.n_questions
            would_wait = n_questions > 1 if each.n_questions else n_continuations > self._settings.engine_max_running
            n_waiting += would_wait
        if would_wait and n_waiting > self._settings.engine_max_waiting:
            raise TooManyRequests(
                "generation_queue_full",
                f"{n_waiting - 1} generation requests are waiting already",
                retry_after=RETRY_SECONDS,
            )

    async def _next_answer(self, pending: _Pending) -> Answer | _TimeLimitChanged:
        """The next answer to a request, or that its time limit has changed.

        Raises:
            Unavailable: a time limit was reached.
        """
        settings = self._settings
        begun = pending.begun_at is not None
        limit = settings.engine_request_seconds if begun or pending.follows else settings.engine_wait_seconds
        try:
            # No limit while the engine starts: it becomes ready or is killed in time, and either is an answer.
            async with asyncio.timeout_at(None if pending.waits_since is None else pending.waits_since + limit):
                return await pending.answers.get()
        except TimeoutError:
            if begun:
                raise Unavailable("generation_timeout", f"not finished after {limit:g} seconds") from None
            raise Unavailable(
                "generation_wait_too_long", f"not begun after {limit:g} seconds", retry_after=RETRY_SECONDS
            ) from None

    # Messages

    def _handle(self, message: FromEngine) -> None:
        """Put a message of the engine where its request is answered."""
        if isinstance(message, EngineReady):
            now = time.monotonic()
            for waiting in self._pending.values():
                waiting.waits_since = now
                waiting.answers.put_nowait(_TimeLimitChanged())
            return
        pending = self._pending.get(message.id)
        if pending is None:
            return  # cancelled
        if isinstance(message, Begun):
            pending.begun_at = message.at
            pending.answers.put_nowait(_TimeLimitChanged())
        elif isinstance(message, Refused):
            pending.answers.put_nowait(_refusal(message))
        elif isinstance(message, Failed):
            # A damaged checkpoint stays damaged; any other failure may pass.
            kind = Conflict if message.code == CheckpointDamaged.code else Unavailable
            pending.answers.put_nowait(kind(message.code, message.message))
        else:
            pending.answers.put_nowait(message)

    def _handle_end(self, error: Unavailable) -> None:
        """Answer the requests that an engine which has ended leaves unanswered."""
        if self._pending:
            log.warning("generation_requests_failed", requests=len(self._pending), code=error.code)
        self.instruments.cached.set(0)
        self.instruments.cache_bytes.set(0)
        for pending in self._pending.values():
            pending.answers.put_nowait(error)


def _refusal(refused: Refused) -> Invalid:
    errors = [] if refused.place is None else [{"loc": ["body", "prompt", *refused.place], "msg": refused.message}]
    return Invalid(refused.code, refused.message, errors=errors)


def _summary(pending: _Pending, done: EngineDone) -> Summary:
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
