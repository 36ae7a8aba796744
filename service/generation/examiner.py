"""Questions about a checkpoint, answered in the engine process: the loss of a text, what a prompt makes the model do,
how likely the tokens of prompts were.

Generation lays weights out in its own way and keeps its cache to itself; here the models asked about last stay loaded
as they were trained. Knows no HTTP.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
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
from nanomoe.generation import logprobs
from nanomoe.model.gpt import GPT
from nanomoe.model.moe import Routing
from nanomoe.tokenizer import Tokenizer
from service.generation.messages import (
    Examined,
    Failed,
    Inspect,
    Inspected,
    LayerRouting,
    LogProbs,
    NextToken,
    PromptsRead,
    PromptToken,
    Question,
    ReadPrompts,
    ReadToken,
    Refused,
    Score,
    Scored,
    TokenLogProb,
)

log = structlog.get_logger(__name__)

MAX_NUMBERS = 1 << 19
"""Most attention weights and figures of routers in one inspection, some 5 MB of JSON."""

KEPT_BYTES = 256 << 20
"""Bytes of models that stay loaded between questions: dozens of a learner's, none of a large one's."""

N_LIKELIEST = 10
_DIGITS = 6


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint that was read, and what it takes to ask it."""

    config: JobConfig
    tokenizer: Tokenizer
    model: GPT

    @classmethod
    def load(cls, folder: Path, manifest_sha256: str | None, device: TorchDevice) -> Self:
        """The model of a checkpoint, every byte verified; without a hash, of a folder whose files are taken as they
        are. Raises CheckpointDamaged."""
        model, config, tokenizer = checkpoint.load_model(checkpoint.open(folder, manifest_sha256), device)
        return cls(config, tokenizer, model)

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(tensor.nbytes for tensor in self.model.state_dict().values())


class Examiner:
    """Answers questions one after the other, and keeps what it has loaded for the next."""

    def __init__(self, device: TorchDevice, *, kept_bytes: int = KEPT_BYTES) -> None:
        self._device = device
        self._kept_bytes = kept_bytes
        self._kept: OrderedDict[str, LoadedModel] = OrderedDict()
        """By manifest sha256, the least recently asked first."""

    @property
    def kept(self) -> list[str]:
        """The manifest sha256 of the checkpoints that are loaded, the least recently asked first."""
        return list(self._kept)

    def answer(self, question: Question) -> Examined | Refused | Failed:
        """Answer a question; whatever is wrong is its answer, and nobody else's."""
        try:
            opened = self._open(Path(question.folder), question.manifest_sha256)
            if isinstance(question, Score):
                return _score(question, opened.tokenizer, opened.model)
            if isinstance(question, ReadPrompts):
                return _read_prompts(question, opened.tokenizer, opened.model)
            return answer_inspect(question, opened.tokenizer, opened.model)
        except CheckpointDamaged as error:
            return Failed(id=question.id, code=error.code, message=str(error))
        except Exception as error:
            log.exception("question_failed", folder=question.folder)
            return Failed(id=question.id, code="checkpoint_unreadable", message=f"{type(error).__name__}: {error}")

    def _open(self, folder: Path, manifest_sha256: str) -> LoadedModel:
        """From what was kept, or from the disk with every byte verified."""
        opened = self._kept.pop(manifest_sha256, None)
        if opened is None:
            opened = LoadedModel.load(folder, manifest_sha256, self._device)
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
    return Scored(id=question.id, tokens=_read(tokenizer, tokens), losses=losses)


def _read_prompts(question: ReadPrompts, tokenizer: Tokenizer, model: GPT) -> PromptsRead | Refused:
    read = []
    for n, prompt in enumerate(question.prompts):
        if refused := unknown_token(question.id, prompt, tokenizer, n):
            return refused
        read.append(tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt))
    return PromptsRead(
        id=question.id, prompts=tuple(_prompt_tokens(tokens, question.logprobs, tokenizer, model) for tokens in read)
    )


def unknown_token(request_id: int, prompt: str | Sequence[int], tokenizer: Tokenizer, *place: int) -> Refused | None:
    """The refusal of a prompt with a token id that the vocabulary does not have; `place`: the prompt's own."""
    if isinstance(prompt, str):
        return None
    size = tokenizer.vocab_size
    n = next((n for n, token in enumerate(prompt) if not 0 <= token < size), None)
    if n is None:
        return None
    message = f"token {prompt[n]} is not in the model's vocabulary, whose ids are 0 to {size - 1}"
    return Refused(id=request_id, code="token_unknown", message=message, place=(*place, n))


def _prompt_tokens(
    tokens: list[int], n_likeliest: int | None, tokenizer: Tokenizer, model: GPT
) -> tuple[PromptToken, ...]:
    read: list[LogProbs | None] = [None] * len(tokens)
    if n_likeliest is not None:
        found = logprobs_of_tokens(model, tokens, n_likeliest)
        read[1:] = [_finite(one, tokenizer) for one in found]
    return tuple(
        PromptToken(utf8=tokenizer.token_bytes(token).hex(), logprobs=one)
        for token, one in zip(tokens, read, strict=True)
    )


def _finite(found: logprobs.LogProbs, tokenizer: Tokenizer) -> LogProbs | None:
    if not math.isfinite(found.chosen.logprob):
        return None
    likeliest = tuple(token_logprob(tokenizer, one) for one in found.likeliest if math.isfinite(one.logprob))
    return LogProbs(chosen=token_logprob(tokenizer, found.chosen), likeliest=likeliest)


def token_logprob(tokenizer: Tokenizer, found: logprobs.TokenLogProb) -> TokenLogProb:
    """A token's log-probability, beside what the token stands for."""
    utf8 = tokenizer.token_bytes(found.token).hex()
    return TokenLogProb(token=found.token, text=tokenizer.decode([found.token]), utf8=utf8, logprob=found.logprob)


def answer_inspect(question: Inspect, tokenizer: Tokenizer, model: GPT) -> Inspected | Refused:
    """What the model does with the question's prompt.

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
        tokens=_read(tokenizer, tokens)[n_unread:],
        likeliest=tuple(
            NextToken(token=token, text=tokenizer.decode([token]), probability=probability)
            for token, probability in zip(ids.tolist(), probabilities.tolist(), strict=True)
        ),
        attention=tuple(
            tuple(tuple(_rounded(row[: t + 1]) for t, row in enumerate(head)) for head in layer)
            for layer in attention_LHTT
        ),
        routing=tuple(_routing(layer, routed, model) for layer, routed in found.routing.items()),
    )


def _routing(layer: int, routed: Routing, model: GPT) -> LayerRouting:
    bias_E = model.moe_layers[layer].router.balance_bias
    return LayerRouting(
        layer=layer,
        logits=tuple(map(_rounded, routed.logits_TE.tolist())),
        probabilities=tuple(map(_rounded, routed.probs_TE.tolist())),
        chosen=tuple(map(tuple, routed.chosen_TK.tolist())),
        gates=tuple(map(_rounded, routed.gates_TK.tolist())),
        balance_bias=None if bias_E is None else _rounded(bias_E.tolist()),
        n_shared_experts=model.config.n_shared_experts,
    )


def _rounded(row: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(value, _DIGITS) for value in row)


def _read(tokenizer: Tokenizer, tokens: Sequence[int]) -> tuple[ReadToken, ...]:
    read = []
    byte_offset = 0
    for token in tokens:
        read.append(ReadToken(token=token, text=tokenizer.decode([token]), byte_offset=byte_offset))
        byte_offset += len(tokenizer.token_bytes(token))
    return tuple(read)
