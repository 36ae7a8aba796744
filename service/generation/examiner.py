"""Questions about a checkpoint, answered in the engine process: the loss of a text, what a model computes at a prompt,
how likely the tokens of prompts were.

Generation lays weights out in its own way and keeps its cache to itself; here the most recently asked models stay
loaded as they were trained. Knows no HTTP.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import structlog
from torch import device as TorchDevice

from nanomoe import checkpoint
from nanomoe.checkpoint import CheckpointDamaged
from nanomoe.config import JobConfig
from nanomoe.evaluation.attention import inspect
from nanomoe.evaluation.score import logprobs_of_tokens, losses_of_tokens
from nanomoe.model.gpt import GPT
from nanomoe.model.moe import Routing
from nanomoe.store.opening import open_store
from nanomoe.store.store import Store, StoreError
from nanomoe.tokenizer import Tokenizer
from service.generation.answers import LayerRoutingView, NextTokenView
from service.generation.messages import (
    Examined,
    Failed,
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
)
from service.generation.tokens import describe_logprobs, prompt_tokens, refuse_unknown_token

log = structlog.get_logger(__name__)

MAX_NUMBERS = 1 << 19
"""Most attention weights and figures of routers in one inspection, some 5 MB of JSON."""

KEPT_BYTES = 256 << 20
"""Bytes of models that stay loaded between questions: dozens of small models, none that is larger."""

N_LIKELIEST = 10
"""Next tokens that an inspection reports."""

_DIGITS = 6


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint that was read, and what it takes to ask it."""

    config: JobConfig
    tokenizer: Tokenizer
    model: GPT

    @classmethod
    def load(cls, folder: Store | Path, manifest_sha256: str | None, device: TorchDevice) -> Self:
        """The model of a checkpoint, every byte verified; without a hash, of a folder whose files are taken as they
        are. Raises CheckpointDamaged, StoreError."""
        model, config, tokenizer = checkpoint.load_model(checkpoint.open(folder, manifest_sha256), device)
        return cls(config, tokenizer, model)

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(tensor.nbytes for tensor in self.model.state_dict().values())


class Examiner:
    """Answers questions one after the other, and keeps the models that it has loaded for later ones."""

    def __init__(
        self, device: TorchDevice, open_folder: Callable[[str], Store] = open_store, *, kept_bytes: int = KEPT_BYTES
    ) -> None:
        """`open_folder` opens the folder of a checkpoint."""
        self._device = device
        self._open_folder = open_folder
        self._kept_bytes = kept_bytes
        self._kept: OrderedDict[str, LoadedModel] = OrderedDict()
        """By manifest sha256, the least recently asked first."""

    def answer(self, question: Question) -> Examined | Refused | Failed:
        """Answer a question; an error becomes its answer, and affects no other question."""
        try:
            opened = self._open(question.folder, question.manifest_sha256)
            if isinstance(question, Score):
                return _score(question, opened.tokenizer, opened.model)
            if isinstance(question, ReadPrompts):
                return _read_prompts(question, opened.tokenizer, opened.model)
            return answer_inspect(question, opened.tokenizer, opened.model)
        except CheckpointDamaged as error:
            return Failed(id=question.id, code=error.code, message=str(error))
        except StoreError as error:
            log.error(error.code, folder=question.folder, reason=str(error))
            return Failed(id=question.id, code=error.code, message=error.summary)
        except Exception as error:
            log.exception("question_failed", folder=question.folder)
            return Failed(id=question.id, code="checkpoint_unreadable", message=f"{type(error).__name__}: {error}")

    def _open(self, folder: str, manifest_sha256: str) -> LoadedModel:
        """From what was kept, or from the store with every byte verified."""
        opened = self._kept.pop(manifest_sha256, None)
        if opened is None:
            opened = LoadedModel.load(self._open_folder(folder), manifest_sha256, self._device)
        self._kept[manifest_sha256] = opened
        total = sum(kept.n_bytes for kept in self._kept.values())
        while total > self._kept_bytes:
            total -= self._kept.popitem(last=False)[1].n_bytes
        return opened


def _score(question: Score, tokenizer: Tokenizer, model: GPT) -> Scored | Refused:
    tokens = tokenizer.encode(question.text)
    if len(tokens) < 2:
        message = "the text has one token: each is predicted from those before it, so there must be two"
        return Refused(id=question.id, code="text_too_short", message=message)
    losses = tuple(loss if math.isfinite(loss) else None for loss in losses_of_tokens(model, tokens))
    return Scored(id=question.id, tokens=prompt_tokens(tokenizer, tokens), losses=losses)


def _read_prompts(question: ReadPrompts, tokenizer: Tokenizer, model: GPT) -> PromptsRead | Refused:
    read = []
    for n, prompt in enumerate(question.prompts):
        if refused := refuse_unknown_token(question.id, prompt, tokenizer, n):
            return refused
        read.append(tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt))
    return PromptsRead(
        id=question.id, prompts=tuple(_prompt_tokens(tokens, question.logprobs, tokenizer, model) for tokens in read)
    )


def _prompt_tokens(
    tokens: list[int], n_likeliest: int | None, tokenizer: Tokenizer, model: GPT
) -> tuple[PromptTokenLogProbs, ...]:
    logprobs: list[LogProbsWithBytes | None] = [None] * len(tokens)
    if n_likeliest is not None:
        found = logprobs_of_tokens(model, tokens, n_likeliest)
        logprobs[1:] = [describe_logprobs(tokenizer, one) for one in found]
    return tuple(
        PromptTokenLogProbs(utf8=tokenizer.token_bytes(token).hex(), logprobs=one)
        for token, one in zip(tokens, logprobs, strict=True)
    )


def answer_inspect(question: Inspect, tokenizer: Tokenizer, model: GPT) -> Inspected | Refused:
    """Next tokens, attention and routing at the question's prompt.

    Raises:
        ValueError: the prompt has no token.
    """
    tokens = tokenizer.encode(question.prompt)
    T = min(len(tokens), model.config.block_size)
    config = model.config
    n_numbers = len(config.moe_layers) * T * 2 * (config.n_experts + config.k)
    if question.attention:
        n_numbers += config.n_layer * config.n_head * T * (T + 1) // 2
    if n_numbers > MAX_NUMBERS:
        message = f"{T} tokens make {n_numbers:,} attention weights and figures of routers; at most {MAX_NUMBERS:,}"
        return Refused(id=question.id, code="inspection_too_large", message=message)
    found = inspect(model, tokens)
    probabilities, ids = found.probabilities_V.topk(min(N_LIKELIEST, tokenizer.vocab_size))
    n_unread = len(tokens) - T
    attention_LHTT = found.attention_LHTT.tolist() if question.attention else []
    return Inspected(
        id=question.id,
        n_unread=n_unread,
        tokens=prompt_tokens(tokenizer, tokens)[n_unread:],
        likeliest=[
            NextTokenView(token=token, text=tokenizer.decode([token]), probability=probability)
            for token, probability in zip(ids.tolist(), probabilities.tolist(), strict=True)
        ],
        attention=[
            [[_rounded(row[: t + 1]) for t, row in enumerate(head)] for head in layer] for layer in attention_LHTT
        ],
        routing=[_routing(layer, routed, model) for layer, routed in found.routing.items()],
    )


def _routing(layer: int, routed: Routing, model: GPT) -> LayerRoutingView:
    bias_E = model.moe_layers[layer].router.balance_bias
    return LayerRoutingView(
        layer=layer,
        logits=[_rounded(row) for row in routed.logits_TE.tolist()],
        probabilities=[_rounded(row) for row in routed.probs_TE.tolist()],
        chosen=routed.chosen_TK.tolist(),
        gates=[_rounded(row) for row in routed.gates_TK.tolist()],
        balance_bias=None if bias_E is None else _rounded(bias_E.tolist()),
        n_shared_experts=model.config.n_shared_experts,
    )


def _rounded(row: Sequence[float]) -> list[float]:
    return [round(value, _DIGITS) for value in row]
