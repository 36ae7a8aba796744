"""An engine that continues many token sequences of one checkpoint at once.

A sequence joins and leaves between steps; a step adds one token to every running sequence with one pass through the
layers. While prompt and new tokens fit `block_size`, keys and values are cached. Beyond, the window slides as nanoGPT's
does: the newest `block_size` tokens at positions from 0, and since every token's position changes, the window is
computed anew for each token.

A sequence's text never depends on who else is being served: the engine computes in float32, whose last bits do depend
on that, but takes a token only if no error within a bound could make it another one (`nanomoe.sampling`); the few that
are too close are computed alone in float64. So every text equals that of `generate_reference`, a plain loop in float64.

Knows no tokenizer, no HTTP and no clock.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nanomoe.choosing import Choosing
from nanomoe.config import ModelConfig
from nanomoe.decoder import Decoder
from nanomoe.model.gpt import GPT
from nanomoe.output_layer import OutputLayer
from nanomoe.sampling import Floats, NoiseStream, Sampling, choose

_PREFILL_TOKENS = 4096
"""Tokens of windows that are computed together: more would only delay everybody's next token."""

FEW_SEQUENCES = 4
"""Fewer than these are computed by one thread: with two, a lone text is a tenth faster on a machine of its own, and
half as fast beside a training (measured)."""


def useful_threads(n_sequences: int, n_threads: int) -> int:
    """How many of `n_threads` a step of so many sequences should use: few gain little from threads that wait for each
    other where others use the machine."""
    return 1 if n_sequences < FEW_SEQUENCES else n_threads


@dataclass(frozen=True)
class Request:
    """A continuation to be made.

    Raises:
        ValueError: the prompt is empty, no token is asked for, or none is allowed.
    """

    prompt: Sequence[int]
    """Token ids, at least one. Only the newest `block_size` are seen."""

    max_new_tokens: int
    """Tokens to add, at least 1."""

    sampling: Sampling = field(default_factory=Sampling)
    """How each is chosen."""

    seed: int = 0
    """With `index`, decides the noise of sampling, 0 or more."""

    index: int = 0
    """Which of several continuations with the same seed."""

    logprobs: int | None = None
    """How many of the likeliest tokens to report beside the chosen one; None reports nothing."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("the prompt has no tokens")
        if self.max_new_tokens < 1:
            raise ValueError("max_new_tokens must be at least 1")
        if self.sampling.top_k is not None and self.sampling.top_k < 1:
            raise ValueError("top_k must be at least 1")


@dataclass(frozen=True)
class LogProbs:
    """ln of probabilities under the model's own softmax: temperature, top_k and top_p change nothing."""

    chosen: float
    """Log probability of the token that was taken."""

    likeliest: dict[int, float]
    """{token: log probability} of the likeliest tokens, best first."""


@dataclass(eq=False)
class Continuation:
    """A request and what was added to it so far. Only the engine changes it."""

    request: Request
    tokens: list[int]
    """The prompt and the new tokens."""

    noise: NoiseStream | None
    new: list[int] = field(default_factory=list)
    """The new tokens."""

    logprobs: list[LogProbs] = field(default_factory=list)
    """One for each new token, if asked for."""

    window_slid: bool = False
    """Whether some token was chosen without seeing the oldest ones."""

    finished: bool = False
    """Whether no token will be added: all were, or it was cancelled."""


class Engine:
    """Continues token sequences of one checkpoint."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        config: ModelConfig,
        *,
        device: torch.device | str = "cpu",
        max_running: int = 64,
        cache_bytes: int = 2**30,
        compiled: bool = False,
    ) -> None:
        """`weights`: parameters and buffers by nanoGPT's names. At most `max_running` sequences run at the same time,
        fewer when their keys and values would not fit `cache_bytes`; the others wait their turn. `compiled`: whether
        to use compiled loops, or on a GPU captured graphs, which pay from some hundred tokens on."""
        self.config = config
        self._decoder = Decoder(weights, config, device, compiled=compiled)
        self.vocab_size = len(self._decoder.wte_VC)
        self._output = OutputLayer(self._decoder.wte_VC, self._decoder.error, compiled=compiled)
        self.max_running = max(1, min(max_running, cache_bytes // self._decoder.row_bytes))
        self._waiting: deque[Continuation] = deque()
        self._cached: list[Continuation] = []
        """Sequence i is in row i of the decoder's cache."""
        self._sliding: list[Continuation] = []
        self.n_recomputed = 0
        """Tokens that float32 could not decide."""

    @property
    def n_running(self) -> int:
        """Sequences that get a token at each step."""
        return len(self._cached) + len(self._sliding)

    @property
    def n_waiting(self) -> int:
        """Sequences that have not begun."""
        return len(self._waiting)

    @property
    def n_bytes(self) -> int:
        """Memory of the weights and the cache."""
        return self._decoder.n_bytes + self._output.n_bytes

    @property
    def numerics(self) -> str:
        """How tokens are computed, in words."""
        return f"{self._output.numerics}; {self._decoder.way}"

    @property
    def output_bytes_per_token(self) -> int:
        """What is read of the output layer for one token, where a short list decides."""
        return self._output.bytes_per_token

    def submit(self, request: Request) -> Continuation:
        """Let a request join at one of the next steps.

        Raises:
            ValueError: a token of the prompt is not in the vocabulary.
        """
        if not all(0 <= token < self.vocab_size for token in request.prompt):
            raise ValueError(f"the prompt has tokens outside of the vocabulary of {self.vocab_size}")
        noise = None if request.sampling.greedy else NoiseStream(request.seed, request.index, self.vocab_size)
        continuation = Continuation(request, list(request.prompt), noise)
        self._waiting.append(continuation)
        return continuation

    @torch.inference_mode()
    def cancel(self, continuation: Continuation) -> None:
        """Take a sequence out, whether it runs, waits or has finished; its slot is free at once."""
        continuation.finished = True
        if continuation in self._waiting:
            self._waiting.remove(continuation)
        self._settle()

    @torch.inference_mode()
    def step(self) -> list[Continuation]:
        """Add one token to every running sequence, after letting waiting ones join. Returns those that got one."""
        joining = self._joining()
        grown: list[Continuation] = []
        if self._cached:
            tokens = [continuation.tokens[-1] for continuation in self._cached]
            positions = [len(continuation.tokens) - 1 for continuation in self._cached]
            grown += self._extend(self._cached, *self._decoder.step(tokens, positions), range(len(tokens)))
        for group in _groups(self._sliding, self._window):
            windows = [self._window(continuation) for continuation in group]
            grown += self._extend(group, *self._decoder.prefill(windows), None)
        for group in _groups(joining, self._window):
            rows = range(len(self._cached), len(self._cached) + len(group))
            self._decoder.reserve(min(self.max_running, 1 << (rows.stop - 1).bit_length()))
            windows = [continuation.tokens for continuation in group]
            hidden_NC, certain = self._decoder.prefill(windows, rows)
            self._cached += group
            grown += self._extend(group, hidden_NC, certain, rows)
        self._settle()
        return grown

    def run(self, requests: Sequence[Request]) -> list[Continuation]:
        """All of these continuations, finished."""
        continuations = [self.submit(request) for request in requests]
        while not all(continuation.finished for continuation in continuations):
            self.step()
        return continuations

    def _joining(self) -> list[Continuation]:
        """Waiting sequences that there is room for and whose keys and values can be cached; the others among them
        slide from the first token on, and are put there."""
        joining: list[Continuation] = []
        while self._waiting and self.n_running + len(joining) < self.max_running:
            continuation = self._waiting.popleft()
            (joining if len(continuation.tokens) < self.config.block_size else self._sliding).append(continuation)
        return joining

    def _window(self, continuation: Continuation) -> list[int]:
        return continuation.tokens[-self.config.block_size :]

    def _settle(self) -> None:
        """Take out what has finished, and let what has outgrown the cache slide. Rows stay without gaps."""
        for row in reversed(range(len(self._cached))):
            continuation = self._cached[row]
            outgrown = len(continuation.tokens) > self.config.block_size
            if not (continuation.finished or outgrown):
                continue
            if not continuation.finished:
                self._sliding.append(continuation)
            last = self._cached.pop()
            if last is not continuation:
                self._decoder.move(len(self._cached), row)
                self._cached[row] = last
        self._sliding = [continuation for continuation in self._sliding if not continuation.finished]

    def _extend(
        self, group: Sequence[Continuation], hidden_NC: Tensor, certain: Sequence[bool], rows: range | None
    ) -> list[Continuation]:
        """Choose the next token of each sequence. `rows`: where their keys and values are, None if nowhere."""
        choosing = Choosing(
            self._output,
            hidden_NC,
            [continuation.request.sampling for continuation in group],
            [None if continuation.noise is None else continuation.noise.draw() for continuation in group],
            wants_logits=[continuation.request.logprobs is not None for continuation in group],
        )
        for n, continuation in enumerate(group):
            token = choosing.tokens[n] if certain[n] else None
            if token is None:
                # Where routing was in doubt, what was cached may be another expert's work: it is put right as well.
                row = rows[n] if rows is not None and not certain[n] else None
                exact_C = self._decoder.exact(self._window(continuation), row)
                token = choosing.decide_exactly(n, exact_C, trust_candidates=certain[n])
                self.n_recomputed += 1
            if continuation.request.logprobs is not None:
                logprobs = _logprobs(choosing.logits[n], token, continuation.request.logprobs)
                continuation.logprobs.append(logprobs)
            continuation.window_slid |= len(continuation.tokens) > self.config.block_size
            continuation.tokens.append(token)
            continuation.new.append(token)
            continuation.finished |= len(continuation.new) == continuation.request.max_new_tokens
        return list(group)


def _groups(
    continuations: list[Continuation], window: Callable[[Continuation], list[int]]
) -> Iterator[list[Continuation]]:
    """Split sequences so that the windows of each group, padded to the longest, are at most `_PREFILL_TOKENS`."""
    group: list[Continuation] = []
    longest = 0
    for continuation in continuations:
        length = len(window(continuation))
        longest = max(longest, length)
        if group and (len(group) + 1) * longest > _PREFILL_TOKENS:
            yield group
            group, longest = [], length
        group.append(continuation)
    if group:
        yield group


def _logprobs(logits_V: Floats, token: int, count: int) -> LogProbs:
    wide_V = logits_V.astype(np.float64)
    largest = wide_V.max()
    total = largest + np.log(np.exp(wide_V - largest).sum())
    likeliest = np.argsort(-wide_V, kind="stable")[:count].tolist()
    return LogProbs(float(wide_V[token] - total), {v: float(wide_V[v] - total) for v in likeliest})


def continue_tokens(
    model: GPT,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> list[int]:
    """The new tokens that a model adds to one prompt, at its present weights."""
    if max_new_tokens == 0:
        return []
    weights = model.state_dict()
    engine = Engine(weights, model.config, device=weights["transformer.wte.weight"].device, max_running=1)
    request = Request(prompt, max_new_tokens, Sampling(temperature, top_k), seed)
    return engine.run([request])[0].new


@torch.no_grad()
def generate_reference(weights: Mapping[str, Tensor], config: ModelConfig, request: Request) -> list[int]:
    """The new tokens by nanoGPT's own loop: the whole window through the model for every token, in float64.

    Slow; what `Engine` is compared with.
    """
    vocab_size = len(weights["transformer.wte.weight"])
    model = GPT(config, vocab_size).double().eval()
    model.load_state_dict(dict(weights))
    noise = NoiseStream(request.seed, request.index, vocab_size)
    tokens = list(request.prompt)
    for _ in range(request.max_new_tokens):
        window_BT = torch.tensor([tokens[-config.block_size :]])
        logits_V = model(window_BT).logits_BTV[0, -1].numpy()
        token = choose(logits_V, request.sampling, noise.draw())
        assert token is not None, "exact logits decide"
        tokens.append(token)
    return tokens[len(request.prompt) :]
