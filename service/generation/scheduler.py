"""Which requests are generated, from their arrival to their last message.

Requests begin in the order of their arrival, as many as may run at the same time; a step adds tokens to every
continuation. Belongs to the engine's main thread. Knows no pipe and no other thread.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog
import torch

from nanomoe.generation.engine import Continuation, Request
from service.generation.checkpoint_cache import CheckpointCache, LoadedCheckpoint, LoadFailure
from service.generation.chunks import ChunkedContinuation
from service.generation.messages import Begun, EngineDone, EngineRequest, Failed, FromEngine, Generate
from service.generation.tokens import refuse_unknown_token

log = structlog.get_logger(__name__)

CHUNK_SECONDS = 0.02
"""Shortest time between two chunks of a streamed continuation: a reader sees no difference, and lines cost time."""


@dataclass
class _Running:
    """A request that is being generated."""

    message: Generate
    loaded: LoadedCheckpoint
    n_prompt: int = 0
    """Tokens of the prompt."""

    continuations: list[ChunkedContinuation] = field(default_factory=list)
    last_chunk_at: float = 0.0
    first_token_at: float | None = None


class Scheduler:
    """Requests that wait, and those that are generated."""

    def __init__(self, cache: CheckpointCache, send: Callable[[FromEngine], None], *, max_running: int) -> None:
        """`max_running`: continuations that are generated at the same time."""
        self._cache = cache
        self._send = send
        self._max_running = max_running
        self._waiting: deque[Generate] = deque()
        self._running: dict[int, _Running] = {}
        self._owners: dict[Continuation, tuple[_Running, ChunkedContinuation]] = {}
        """Unfinished continuation -> its request and its chunks."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being generated."""
        return not self._running

    @property
    def n_continuations(self) -> int:
        """Continuations that are being generated."""
        return len(self._owners)

    def add(self, message: Generate) -> None:
        """Let a request wait for its turn."""
        self._waiting.append(message)

    def cancel(self, request_id: int) -> None:
        """End a request, if there is one with this id, without another message."""
        self._waiting = deque(message for message in self._waiting if message.id != request_id)
        running = self._running.get(request_id)
        if running is not None:
            self._end(running)

    def fail_waiting(self, manifest_sha256: str, failure: LoadFailure) -> None:
        """Answer the requests that wait for a checkpoint which cannot be loaded."""
        for message in [waiting for waiting in self._waiting if waiting.request.manifest_sha256 == manifest_sha256]:
            self._waiting.remove(message)
            self._send(Failed(id=message.id, code=failure.code, message=failure.message))

    def begin_waiting(self) -> None:
        """Begin requests in the order of their arrival, as many as there is room for; one whose checkpoint is still
        being loaded does not hold up those behind it."""
        for message in list(self._waiting):
            sha256 = message.request.manifest_sha256
            if sha256 not in self._cache:
                self._cache.load(message.request.folder, sha256)
            elif self.is_idle or self.n_continuations + message.request.n <= self._max_running:
                self._waiting.remove(message)
                self._begin(message)
            else:
                return

    def step(self) -> None:
        """Add tokens to every continuation, and send the chunks that are due."""
        for loaded in self._cache.in_use:
            with self._failing_only_requests_of(loaded):
                self._step(loaded)

    @contextmanager
    def _failing_only_requests_of(self, loaded: LoadedCheckpoint) -> Iterator[None]:
        """An error in the block ends the requests that are generated from this checkpoint, and no others. The
        checkpoint is loaded again for the next request, because its engine may be in any state."""
        try:
            yield
        except torch.AcceleratorError:
            raise  # the device is lost to this process: the next one can use it again
        except Exception as error:
            log.exception("generation_failed")
            self._cache.remove(loaded)
            for running in [running for running in self._running.values() if running.loaded is loaded]:
                for chunked in running.continuations:
                    self._owners.pop(chunked.continuation, None)
                del self._running[running.message.id]
                reason = f"{type(error).__name__}: {error}"
                self._send(Failed(id=running.message.id, code="generation_failed", message=reason))

    def _begin(self, message: Generate) -> None:
        request = message.request
        tokenizer = self._cache[request.manifest_sha256].tokenizer
        if refused := refuse_unknown_token(message.id, request.prompt, tokenizer):
            self._send(refused)
            return
        loaded = self._cache.acquire(request.manifest_sha256)
        running = self._running[message.id] = _Running(message, loaded)
        with self._failing_only_requests_of(loaded):
            prompt = request.prompt
            if isinstance(prompt, str):
                prompt = tuple(loaded.tokenizer.encode(prompt))
            running.n_prompt = len(prompt)
            for index in range(request.n):
                continuation = loaded.engine.submit(_one_of_n(request, prompt, index))
                chunked = ChunkedContinuation(message.id, index, continuation, loaded.tokenizer, stop=request.stop)
                running.continuations.append(chunked)
                self._owners[continuation] = (running, chunked)
            self._send(Begun(id=message.id, at=time.monotonic()))

    def _step(self, loaded: LoadedCheckpoint) -> None:
        """Add tokens to every continuation of one checkpoint."""
        touched: dict[int, _Running] = {}
        for continuation in loaded.engine.step():
            running, chunked = self._owners[continuation]
            touched[running.message.id] = running
            chunked.update()
        now = time.monotonic()
        for running in touched.values():
            if running.first_token_at is None:
                running.first_token_at = now
            due = running.message.stream and now - running.last_chunk_at >= CHUNK_SECONDS
            for chunked in running.continuations:
                if chunked.continuation in self._owners and (due or chunked.finish_reason is not None):
                    self._send_chunk(running, chunked)
            if due:
                running.last_chunk_at = now
            if all(chunked.finish_reason is not None for chunked in running.continuations):
                self._finish(running, now)

    def _send_chunk(self, running: _Running, chunked: ChunkedContinuation) -> None:
        chunk = chunked.next_chunk()
        if chunked.finish_reason is not None:
            self._stop_generating(running, chunked)
        if chunk is not None:
            self._send(chunk)

    def _finish(self, running: _Running, now: float) -> None:
        assert running.first_token_at is not None
        continuations = [chunked.continuation for chunked in running.continuations]
        self._send(
            EngineDone(
                id=running.message.id,
                prompt_tokens=running.n_prompt,
                completion_tokens=sum(len(continuation.new) for continuation in continuations),
                window_slid=any(continuation.window_slid for continuation in continuations),
                numerics=running.loaded.engine.numerics,
                first_token_at=running.first_token_at,
                finished_at=now,
                n_cached=len(self._cache.manifests),
                cache_bytes=self._cache.n_bytes,
            )
        )
        self._end(running)

    def _end(self, running: _Running) -> None:
        for chunked in running.continuations:
            self._stop_generating(running, chunked)
        del self._running[running.message.id]
        self._cache.release(running.loaded)

    def _stop_generating(self, running: _Running, chunked: ChunkedContinuation) -> None:
        """Take a continuation out of its engine, if it is still there."""
        if self._owners.pop(chunked.continuation, None) is not None and not chunked.continuation.finished:
            running.loaded.engine.cancel(chunked.continuation)


def _one_of_n(request: EngineRequest, prompt: tuple[int, ...], index: int) -> Request:
    """What the engine is asked for by one of a request's `n` continuations."""
    return Request(
        prompt,
        request.max_new_tokens,
        request.sampling,
        request.seed,
        index,
        request.logprobs,
        may_end_early=bool(request.stop),
    )
