"""Questions about a checkpoint, answered in the engine process: the loss of a text, what a prompt makes the model do,
how likely the tokens of prompts were.

Each question reads its checkpoint anew, every byte verified: they are rare, and generation keeps its cache to itself.
Knows no HTTP.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import structlog
from safetensors.torch import load as load_safetensors
from torch import device as TorchDevice

from nanomoe import checkpoint
from nanomoe import generate as nanomoe_generate
from nanomoe.checkpoint import CheckpointDamaged
from nanomoe.config import JobConfig
from nanomoe.inspect import inspect
from nanomoe.model import GPT
from nanomoe.score import logprobs_of_tokens, losses_of_tokens
from nanomoe.tokenizer import Tokenizer
from service.engine_messages import (
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
"""Most attention weights and router probabilities of one inspection, some 5 MB of JSON."""

N_LIKELIEST = 10
_DIGITS = 6


def examine(question: Question, device: TorchDevice) -> Examined | Refused | Failed:
    """Answer a question; whatever is wrong is its answer, and nobody else's."""
    try:
        tokenizer, model = _open(Path(question.folder), question.manifest_sha256, device)
        if isinstance(question, Score):
            return _score(question, tokenizer, model)
        if isinstance(question, ReadPrompts):
            return _read_prompts(question, tokenizer, model)
        return _inspect(question, tokenizer, model)
    except CheckpointDamaged as error:
        return Failed(id=question.id, code=error.code, message=str(error))
    except Exception as error:
        log.exception("question_failed", folder=question.folder)
        return Failed(id=question.id, code="checkpoint_unreadable", message=f"{type(error).__name__}: {error}")


def _open(folder: Path, manifest_sha256: str, device: TorchDevice) -> tuple[Tokenizer, GPT]:
    checkpoint.verify(folder, manifest_sha256)
    tokenizer = Tokenizer.load(folder)
    config = JobConfig.model_validate_json((folder / checkpoint.CONFIG).read_bytes())
    model = GPT.build(config, tokenizer.vocab_size, device)
    model.load_state_dict(load_safetensors((folder / checkpoint.WEIGHTS).read_bytes()))
    return tokenizer, model


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
    logprobs: list[LogProbs | None] = [None] * len(tokens)
    if n_likeliest is not None:
        found = logprobs_of_tokens(model, tokens, n_likeliest)
        logprobs[1:] = [_finite(one, token, tokenizer) for one, token in zip(found, tokens[1:], strict=True)]
    return tuple(
        PromptToken(utf8=tokenizer.token_bytes(token).hex(), logprobs=one)
        for token, one in zip(tokens, logprobs, strict=True)
    )


def _finite(found: nanomoe_generate.LogProbs, token: int, tokenizer: Tokenizer) -> LogProbs | None:
    if not math.isfinite(found.chosen):
        return None
    likeliest = tuple(
        token_logprob(tokenizer, other, logprob) for other, logprob in found.likeliest.items() if math.isfinite(logprob)
    )
    return LogProbs(chosen=token_logprob(tokenizer, token, found.chosen), likeliest=likeliest)


def token_logprob(tokenizer: Tokenizer, token: int, logprob: float) -> TokenLogProb:
    """A token's log-probability, beside what the token stands for."""
    utf8 = tokenizer.token_bytes(token).hex()
    return TokenLogProb(token=token, text=tokenizer.decode([token]), utf8=utf8, logprob=logprob)


def _inspect(question: Inspect, tokenizer: Tokenizer, model: GPT) -> Inspected | Refused:
    tokens = tokenizer.encode(question.prompt)
    T = min(len(tokens), model.config.block_size)
    config = model.config
    n_routers = sum(config.is_moe_layer(layer) for layer in range(config.n_layer))
    n_numbers = config.n_layer * config.n_head * T * (T + 1) // 2 + n_routers * T * config.n_experts
    if n_numbers > MAX_NUMBERS:
        message = f"{T} tokens make {n_numbers:,} attention weights and router probabilities; at most {MAX_NUMBERS:,}"
        return Refused(id=question.id, code="inspection_too_large", message=message)
    found = inspect(model, tokens)
    probabilities, ids = found.probabilities_V.topk(min(N_LIKELIEST, tokenizer.vocab_size))
    n_unread = len(tokens) - T
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
            for layer in found.attention_LHTT.tolist()
        ),
        routing=tuple(
            LayerRouting(layer=layer, probabilities=tuple(map(_rounded, probs_TE.tolist())))
            for layer, probs_TE in found.routing.items()
        ),
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
