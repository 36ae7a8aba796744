"""An engine that makes many continuations from one checkpoint at once.

A continuation joins and leaves between steps; a step adds a token to every running one, or several where captured
graphs do. While prompt and new tokens
fit `block_size`, keys and values are cached. Beyond, the window slides as nanoGPT's does: the newest `block_size`
tokens at positions from 0, and since every token's position changes, the window is computed anew for each token.

A continuation depends on the weights, the prompt, the sampling and the seed alone, never on who else is being served or
when it joined: how a step is computed (`decoder`) and how the next token is chosen (`output_layer`, `sampling`) both
promise each continuation arithmetic of its own.

Knows no tokenizer, no HTTP and no clock.
"""

import functools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nanomoe.config import ModelConfig, SamplingConfig
from nanomoe.cuda_graphs import CudaGraphs
from nanomoe.generation import decoder, device_sampling, output_layer, sampling
from nanomoe.generation.decoder import CompiledDecoder, Decoder, Span, TensorDecoder
from nanomoe.generation.graphs import TOKENS_AT_ONCE, Newest, TokenGraphs
from nanomoe.generation.logprobs import LogProbs
from nanomoe.generation.output_layer import CompiledOutputLayer, OutputLayer, TensorOutputLayer
from nanomoe.generation.sampling import Candidates, Floats
from nanomoe.model.gpt import GPT

FEW_CONTINUATIONS = 4
"""Fewer than these are computed by one thread: with two, a lone continuation is a tenth faster on a machine of its own,
and half as fast beside a training (measured)."""


def useful_threads(n_continuations: int, n_threads: int) -> int:
    """How many of `n_threads` a step of so many continuations should use: few gain little from threads that wait for
    each other where others use the machine."""
    return 1 if n_continuations < FEW_CONTINUATIONS else n_threads


@dataclass(frozen=True)
class Request:
    """A continuation to be made.

    Raises:
        ValueError: the prompt is empty or no token is asked for.
    """

    prompt: Sequence[int]
    """Token ids, at least one. Only the newest `block_size` are seen."""

    max_new_tokens: int
    """Tokens to add, at least 1."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How each is chosen."""

    seed: int = 0
    """With `index`, decides what is drawn, 0 or more."""

    index: int = 0
    """Which of several continuations with the same seed."""

    logprobs: int | None = None
    """How many of the likeliest tokens to report beside the chosen one; None reports nothing."""

    may_end_early: bool = False
    """Whether it may be cancelled for what its newest token says, so that no step may add two."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("the prompt has no tokens")
        if self.max_new_tokens < 1:
            raise ValueError("max_new_tokens must be at least 1")


@dataclass(eq=False)
class Continuation:
    """A request and what was added to it so far. Only the engine changes it."""

    request: Request
    tokens: list[int]
    """The prompt and the new tokens."""

    uniforms: np.random.Generator
    """Random generator of this continuation: one number a token."""

    new: list[int] = field(default_factory=list)
    """The new tokens."""

    logprobs: list[LogProbs] = field(default_factory=list)
    """One for each new token, if asked for."""

    window_slid: bool = False
    """Whether some token was chosen without seeing the oldest ones."""

    finished: bool = False
    """Whether no token will be added: all were, or it was cancelled."""


class Engine:
    """Makes continuations from one checkpoint."""

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
        """`weights`: parameters and buffers by nanoGPT's names, any float type. At most `max_running` continuations run
        at the same time, fewer when their keys and values would not fit `cache_bytes`; the others wait their turn.
        `compiled`: whether to use compiled loops, or on a GPU a captured graph, which pay from some hundred tokens on.

        Raises:
            ValueError: a weight is not finite.
        """
        for name, tensor in weights.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} is not finite")
        device = torch.device(device)
        weights = {name: tensor.detach().to(device, torch.float32).contiguous() for name, tensor in weights.items()}
        wte_VC = weights["transformer.wte.weight"]
        self.config = config
        self.vocab_size = len(wte_VC)
        self._decoder: Decoder
        self._output: OutputLayer
        on_gpu = device.type == "cuda"
        self._chosen_on_device: TensorOutputLayer | None = None
        """Where the next tokens are chosen on the device, what computes their logits."""
        self._token_graphs: TokenGraphs | None = None
        """What adds tokens to the continuations that are cached, where captured graphs do."""
        if on_gpu:
            torch.backends.cuda.matmul.allow_tf32 = False  # some containers allow it; texts are float32's
        if compiled and not on_gpu:
            self._decoder, self._output = CompiledDecoder(weights, config), CompiledOutputLayer(wte_VC)
            self.max_running = max(1, min(max_running, cache_bytes // self._decoder.row_bytes))
        else:
            self.max_running = max(1, min(max_running, cache_bytes // decoder.row_bytes(config)))
            self._decoder = TensorDecoder(weights, config, device, self.max_running, in_one_shape=on_gpu)
            self._output = TensorOutputLayer(wte_VC, self.max_running)
            self._chosen_on_device = self._output if on_gpu else None
            if on_gpu and compiled:
                self._token_graphs = TokenGraphs(self._decoder, self._output, CudaGraphs(device))
        self._waiting: deque[Continuation] = deque()
        self._rows: list[Continuation | None] = [None] * self.max_running
        """The running continuations, by their rows of the decoder's cache."""

    @property
    def n_running(self) -> int:
        """Continuations that get a token at each step."""
        return sum(continuation is not None for continuation in self._rows)

    @property
    def n_waiting(self) -> int:
        """Continuations that have not begun."""
        return len(self._waiting)

    @property
    def n_bytes(self) -> int:
        """Memory of the weights and the cache."""
        return self._decoder.n_bytes + self._output.n_bytes

    @property
    def numerics(self) -> str:
        """How tokens are computed, in words."""
        how = self._decoder.numerics if self._token_graphs is None else "captured CUDA graphs"
        return f"{self._output.numerics}; {how}"

    @property
    def output_bytes_per_token(self) -> int:
        """What is read of the output layer for one token, where a short list is enough."""
        return self._output.bytes_per_token

    def submit(self, request: Request) -> Continuation:
        """Let a request join at one of the next steps.

        Raises:
            ValueError: a token of the prompt is not in the vocabulary.
        """
        if not all(0 <= token < self.vocab_size for token in request.prompt):
            raise ValueError(f"the prompt has tokens outside of the vocabulary of {self.vocab_size}")
        stream = sampling.uniform_stream(request.seed, request.index)
        continuation = Continuation(request, list(request.prompt), stream)
        self._waiting.append(continuation)
        return continuation

    def cancel(self, continuation: Continuation) -> None:
        """Take a continuation out, whether it runs, waits or has finished; its row is free at once."""
        continuation.finished = True
        if continuation in self._waiting:
            self._waiting.remove(continuation)
        self._free_rows()

    @torch.inference_mode()
    def step(self) -> list[Continuation]:
        """Add a token to every running continuation, after letting waiting ones join; captured graphs add several to
        those that are cached (`graphs.TOKENS_AT_ONCE`). Returns those that got any.

        Raises:
            ValueError: a hidden state or logit overflows float32.
        """
        for row, occupant in enumerate(self._rows):
            if occupant is None and self._waiting:
                self._rows[row] = self._waiting.popleft()
        running = [(row, continuation) for row, continuation in enumerate(self._rows) if continuation is not None]
        others = running
        if self._token_graphs is not None:
            cached = [(row, continuation) for row, continuation in running if self._is_cached(continuation)]
            others = [one for one in running if one not in cached]
            # First, since a replay writes something to the first positions of every other row.
            if cached:
                self._add_captured(self._token_graphs, cached)
        if others:
            spans = [self._span(row, continuation) for row, continuation in others]
            self._extend([continuation for _, continuation in others], self._decoder.step(spans))
        self._free_rows()
        return [continuation for _, continuation in running]

    def run(self, requests: Sequence[Request]) -> list[Continuation]:
        """All of these continuations, finished."""
        continuations = [self.submit(request) for request in requests]
        while not all(continuation.finished for continuation in continuations):
            self.step()
        return continuations

    def _is_cached(self, continuation: Continuation) -> bool:
        """Whether keys and values of all its tokens but the newest are cached, and stay: no position changes."""
        n_tokens = len(continuation.tokens)
        return (bool(continuation.new) or n_tokens == 1) and n_tokens <= self.config.block_size

    def _span(self, row: int, continuation: Continuation) -> Span:
        """What has to be computed for a continuation's next token: its newest one; all, where none was computed before
        or their positions change."""
        tokens = continuation.tokens
        if self._is_cached(continuation):
            return Span(row, len(tokens) - 1, tokens[-1:])
        return Span(row, 0, tokens[-self.config.block_size :])

    def _add_captured(self, graphs: TokenGraphs, cached: Sequence[tuple[int, Continuation]]) -> None:
        """Add tokens to continuations by captured graphs: several where nobody looks at each."""
        requests = [continuation.request for _, continuation in cached]
        one_by_one = any(request.may_end_early or request.logprobs is not None for request in requests)
        most = 1 if one_by_one else TOKENS_AT_ONCE
        newest = []
        for row, continuation in cached:
            request, tokens = continuation.request, continuation.tokens
            n_left = request.max_new_tokens - len(continuation.new)
            n_wanted = min(most, n_left, self.config.block_size + 1 - len(tokens))
            uniforms = continuation.uniforms.random(n_wanted).tolist()
            newest.append(Newest(row, tokens[-1], len(tokens) - 1, request.sampling, uniforms))
        for (row, continuation), tokens in zip(cached, graphs.add(newest), strict=True):
            if device_sampling.NOT_FINITE in tokens:
                raise ValueError(sampling.OVERFLOW)
            request = continuation.request
            for token in tokens:
                logprobs = None
                if request.logprobs is not None:
                    logprobs = _logprobs(request, graphs.logits(row).cpu().numpy(), token)
                self._append(continuation, token, logprobs)

    def _free_rows(self) -> None:
        self._rows = [None if running is None or running.finished else running for running in self._rows]

    def _extend(self, grown: Sequence[Continuation], hidden_NC: Tensor) -> None:
        """Choose the next token of each continuation."""
        requests = [continuation.request for continuation in grown]
        uniforms = [continuation.uniforms.random() for continuation in grown]
        layer = self._chosen_on_device
        choose = self._chosen_alone if layer is None else functools.partial(_chosen_together, layer)
        for continuation, (token, logprobs) in zip(grown, choose(requests, uniforms, hidden_NC), strict=True):
            self._append(continuation, token, logprobs)

    def _append(self, continuation: Continuation, token: int, logprobs: LogProbs | None) -> None:
        if logprobs is not None:
            continuation.logprobs.append(logprobs)
        continuation.window_slid |= len(continuation.tokens) > self.config.block_size
        continuation.tokens.append(token)
        continuation.new.append(token)
        continuation.finished |= len(continuation.new) == continuation.request.max_new_tokens

    def _chosen_alone(
        self, requests: Sequence[Request], uniforms: Sequence[float], hidden_NC: Tensor
    ) -> Iterator[tuple[int, LogProbs | None]]:
        """The next token of each request, one after another, on the CPU."""
        counts = [
            output_layer.candidates_needed(request.sampling, wants_logprobs=request.logprobs is not None)
            for request in requests
        ]
        candidates: list[Candidates] = self._output.candidates(hidden_NC, counts)
        for request, row, uniform in zip(requests, candidates, uniforms, strict=True):
            token = sampling.choose(row, request.sampling, uniform)
            yield token, _logprobs(request, row.logits, token)


def _chosen_together(
    layer: TensorOutputLayer, requests: Sequence[Request], uniforms: Sequence[float], hidden_NC: Tensor
) -> Iterator[tuple[int, LogProbs | None]]:
    """The next token of each request, on the device and in a shape that does not depend on how many there are."""
    n_beyond = layer.n_rows - len(requests)
    samplings = [request.sampling for request in requests] + n_beyond * [SamplingConfig(temperature=0)]
    logits_RV = layer.all_logits(hidden_NC)
    tokens = device_sampling.choose_all(logits_RV, samplings, [*uniforms, *n_beyond * [0.0]])
    for n, (request, token) in enumerate(zip(requests, tokens, strict=False)):
        yield token, None if request.logprobs is None else _logprobs(request, logits_RV[n].cpu().numpy(), token)


def _logprobs(request: Request, logits_V: Floats, token: int) -> LogProbs | None:
    if request.logprobs is None:
        return None
    return sampling.token_logprobs(logits_V, token, request.logprobs)


@torch.no_grad()
def generate_reference(weights: Mapping[str, Tensor], config: ModelConfig, request: Request) -> list[int]:
    """The new tokens by nanoGPT's own loop: the whole window through the model for every token, in float32.

    Slow; what `Engine` is compared with.
    """
    model = GPT(config, len(weights["transformer.wte.weight"])).eval()
    model.load_state_dict(dict(weights))
    uniforms = sampling.uniform_stream(request.seed, request.index)
    tokens = list(request.prompt)
    for _ in range(request.max_new_tokens):
        window_BT = torch.tensor([tokens[-config.block_size :]])
        logits_V = model(window_BT).logits_BTV[0, -1].numpy()
        tokens.append(sampling.choose(Candidates(logits_V), request.sampling, uniforms.random()))
    return tokens[len(request.prompt) :]
