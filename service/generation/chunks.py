"""One continuation of a request, as the chunks of text that the engine sends.

Knows no checkpoint and no other request.
"""

from collections.abc import Sequence

from nanomoe.generation.engine import Continuation
from nanomoe.tokenizer import Tokenizer
from service.generation.answers import FinishReason
from service.generation.messages import Chunk, LogProbsWithBytes
from service.generation.text_stream import TextStream
from service.generation.tokens import describe_logprobs


class ChunkedContinuation:
    """A continuation, and how much of it was sent."""

    def __init__(
        self, request_id: int, index: int, continuation: Continuation, tokenizer: Tokenizer, *, stop: Sequence[str]
    ) -> None:
        """`index`: its number among the continuations of the request; `stop`: strings that end it."""
        self.continuation = continuation
        self.finish_reason: FinishReason | None = None
        self._request_id = request_id
        self._index = index
        self._tokenizer = tokenizer
        self._text = TextStream(tokenizer, stop)
        self._unsent = ""
        self._n_decoded = 0
        """Tokens that `_text` was given."""
        self._n_sent = 0
        """Tokens that were sent."""

    def update(self) -> None:
        """Find out, after a step, whether the continuation has ended, and why."""
        if self._text.has_stops:
            self._decode()
        if self._text.stopped:
            self.finish_reason = "stop"
        elif self.continuation.finished:
            self.finish_reason = "length"

    def next_chunk(self) -> Chunk | None:
        """What was gained since the last chunk; None for nothing. Not to be called after the last chunk, which has a
        finish reason."""
        self._decode()
        if self.finish_reason is not None:
            self._unsent += self._text.finish()
            if self._text.stopped:
                self.finish_reason = "stop"
        begun = range(self._n_sent, self._text.n_begun)
        if not (begun or self._unsent or self.finish_reason):
            return None
        chunk = Chunk(
            id=self._request_id,
            index=self._index,
            text=self._unsent,
            tokens=tuple(self.continuation.new[begun.start : begun.stop]),
            logprobs=self._log_probs(begun),
            finish_reason=self.finish_reason,
        )
        self._unsent, self._n_sent = "", begun.stop
        return chunk

    def _decode(self) -> None:
        new = self.continuation.new
        self._unsent += self._text.push(new[self._n_decoded :])
        self._n_decoded = len(new)

    def _log_probs(self, tokens: range) -> tuple[LogProbsWithBytes, ...] | None:
        if self.continuation.request.logprobs is None:
            return None
        described = []
        for n in tokens:
            found = describe_logprobs(self._tokenizer, self.continuation.logprobs[n])
            if found is None:
                raise ValueError(f"the log-probability of token {n} is not finite")
            described.append(found)
        return tuple(described)
