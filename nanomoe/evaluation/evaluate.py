"""Measure a checkpoint's metrics, which `nanomoe.evaluation.metrics` declares.

Whoever loads the weights can recompute every metric. Knows no optimizer, no file and no clock.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nanomoe.config import JobConfig
from nanomoe.data import IGNORE, Windows
from nanomoe.evaluation.metrics import (
    Baselines,
    CheckpointMetrics,
    Continuation,
    MixtureMetrics,
    Position,
    ReconstructedToken,
    Reconstruction,
    perplexity,
)
from nanomoe.evaluation.moe_metrics import LayerRouting, expert_cards, moe_metrics, moe_warnings
from nanomoe.generation.engine import continue_tokens
from nanomoe.model.gpt import GPT, token_losses
from nanomoe.tokenizer import Tokenizer

MAX_RECONSTRUCTED = 2048
"""Targets that a reconstruction holds."""

LOGITS_BYTES = 64 * 2**20
"""Logits held at once; a longer text is evaluated in several batches."""

Choices = dict[int, Tensor]
"""{layer: (targets, K) int16}: the experts of each token that has a target, in the text's order.

Row i is the routing of token i, after which token i + 1 is predicted: what `routing.safetensors` holds, and `churn`
compares."""


@dataclass(frozen=True)
class Evaluation:
    """The metrics of one checkpoint, and the routing that the next one is compared with."""

    metrics: CheckpointMetrics
    choices: Choices

    def warnings(self, *, after_half: bool) -> list[tuple[str, str]]:
        """(code, message) of what looks wrong; `after_half`: more than half of the training is done."""
        moe = self.metrics.moe
        return moe_warnings(moe, after_half=after_half) if moe is not None else []


@contextmanager
def _evaluating(model: GPT) -> Iterator[None]:
    """Evaluation mode (no capacity, no noise), and back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _batches(model: GPT, windows: Windows) -> Iterator[list[int]]:
    return windows.batches(max(1, LOGITS_BYTES // (4 * windows.length * model.vocab_size)))


@torch.no_grad()
def evaluate_loss(model: GPT, windows: Windows) -> float:
    """Mean cross-entropy of the targets, nats per token."""
    total, n = 0.0, 0
    with _evaluating(model):
        for batch in _batches(model, windows):
            inputs_BT, targets_BT = windows.batch(batch)
            total += token_losses(model(inputs_BT).logits_BTV, targets_BT).double().sum().item()
            n += windows.n_targets(batch)
    return total / n


def entropy_baselines(tokens: list[int], vocab_size: int) -> Baselines:
    """What simpler predictors would reach on this text's targets, nats per token.

    `uniform` knows nothing: ln V. `unigram` knows how often each token is a target: the entropy H(x). `bigram` knows
    that for each preceding token: the conditional entropy H(x_t | x_{t-1}).
    """

    def entropy(counts: Counter[Any]) -> float:
        n = counts.total()
        return -sum(c / n * math.log(c / n) for c in counts.values())

    unigram = entropy(Counter(tokens[1:]))
    bigram = entropy(Counter(pairwise(tokens))) - entropy(Counter(tokens[:-1]))
    return Baselines(uniform=math.log(vocab_size), unigram=max(0.0, unigram), bigram=max(0.0, bigram))


def evaluate(
    model: GPT,
    windows: Windows,
    val_windows: Windows | None,
    tokenizer: Tokenizer,
    config: JobConfig,
    *,
    position: Position,
    previous_choices: Choices,
    train_loss: float | None,
    train_dropped: dict[int, float],
) -> Evaluation:
    """All metrics of the model as it stands, at `position` of its training.

    `previous_choices`: those of the checkpoint before, empty at percent 0. `train_dropped`: per MoE layer, the share
    of assignments that the training steps since then dropped.
    """
    with _evaluating(model):
        read = _read_text(model, windows)
        tokens = windows.tokens
        targets = tokens[1:]
        loss = sum(read.losses) / len(targets)
        n_bytes = sum(len(tokenizer.token_bytes(target)) for target in targets)
        metrics = CheckpointMetrics(
            **dict(position),
            loss=loss,
            perplexity=perplexity(loss),
            bits_per_byte=sum(read.losses) / math.log(2) / n_bytes,
            train_loss=train_loss,
            accuracy=sum(p == t for p, t in zip(read.predicted, targets, strict=True)) / len(targets),
            val_loss=evaluate_loss(model, val_windows) if val_windows is not None else None,
            baselines=entropy_baselines(tokens, tokenizer.vocab_size),
            reconstruction=_reconstruction(tokens, read, tokenizer),
            continuation=_continuation(model, tokens, tokenizer, config),
            moe=_moe(model, windows, read, tokenizer, config, previous_choices, train_dropped),
        )
    return Evaluation(metrics, {layer: r.chosen_TK.to("cpu", torch.int16) for layer, r in read.routing.items()})


def _moe(
    model: GPT,
    windows: Windows,
    read: "_Reading",
    tokenizer: Tokenizer,
    config: JobConfig,
    previous_choices: Choices,
    train_dropped: dict[int, float],
) -> MixtureMetrics | None:
    """How the experts share the work; None for a dense model."""
    if not read.routing:
        return None
    inputs = windows.tokens[:-1]
    return moe_metrics(
        read.routing,
        config,
        tokens_per_batch=min(windows.count, config.batch_size) * windows.length,
        previous_choices=previous_choices,
        train_dropped=train_dropped,
        router_grad_norms=_router_grad_norms(model, windows),
        losses_without=_losses_without(model, windows, config),
        cards={
            layer: expert_cards(routing.chosen_TK, inputs, config.n_experts, tokenizer)
            for layer, routing in read.routing.items()
        },
    )


@dataclass(frozen=True)
class _Reading:
    """The model's losses, predictions and routing at every target, in the text's order."""

    losses: list[float]
    predicted: list[int]
    routing: dict[int, LayerRouting]
    """{layer: routing of the tokens that have a target}."""


@torch.no_grad()
def _read_text(model: GPT, windows: Windows) -> _Reading:
    losses: list[float] = []
    predicted: list[int] = []
    parts: dict[int, list[LayerRouting]] = {layer: [] for layer in model.moe_layers}
    for batch in _batches(model, windows):
        inputs_BT, targets_BT = windows.batch(batch)
        logits_BTV, routings = model(inputs_BT)
        real_BT = targets_BT != IGNORE
        losses += token_losses(logits_BTV, targets_BT)[real_BT].tolist()
        predicted += logits_BTV.argmax(-1)[real_BT].tolist()
        for layer, routing in routings.items():
            parts[layer].append(LayerRouting.of(routing, real_BT.flatten()))
    return _Reading(losses, predicted, {layer: LayerRouting.join(rows) for layer, rows in parts.items()})


def _reconstruction(tokens: list[int], read: _Reading, tokenizer: Tokenizer) -> Reconstruction:
    """The model's prediction in place of every target: the first `MAX_RECONSTRUCTED` of them.

    Position i holds the token that was seen and routed there, `input`, and what was predicted after it: `experts` are
    those of `input`, `target` is the token that follows it.
    """
    shown = min(len(tokens) - 1, MAX_RECONSTRUCTED)
    chosen = [routing.chosen_TK[:shown].tolist() for routing in read.routing.values()]
    entries = []
    byte_offset = len(tokenizer.token_bytes(tokens[0]))
    for i, target in enumerate(tokens[1 : shown + 1]):
        entry = ReconstructedToken(
            input=tokenizer.decode([tokens[i]]),
            target=tokenizer.decode([target]),
            predicted=tokenizer.decode([read.predicted[i]]),
            loss=read.losses[i],
            id=target,
            byte_offset=byte_offset,
        )
        if chosen:
            entry = entry.model_copy(update={"experts": [layer[i] for layer in chosen]})
        entries.append(entry)
        byte_offset += len(tokenizer.token_bytes(target))
    text = tokenizer.decode(read.predicted[:shown])
    return Reconstruction(text=text, tokens=entries, truncated=shown < len(tokens) - 1)


def _continuation(model: GPT, tokens: list[int], tokenizer: Tokenizer, config: JobConfig) -> Continuation:
    """What the model adds to the text's first tokens."""
    prompt = tokens[: config.cont_prefix_tokens]
    added = continue_tokens(
        model,
        prompt,
        max_new_tokens=config.cont_max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        seed=config.seed,
    )
    return Continuation(prompt=tokenizer.decode(prompt), text=tokenizer.decode(added))


def _router_grad_norms(model: GPT, windows: Windows) -> dict[int, float]:
    """Norm of the cross-entropy's gradient at each router's weight, on window 0 without dropout: 0 is a dead router."""
    inputs_BT, targets_BT = windows.batch([0])
    loss = token_losses(model(inputs_BT).logits_BTV, targets_BT).sum() / windows.n_targets([0])
    routers = {layer: moe.router.weight for layer, moe in model.moe_layers.items()}
    gradients = torch.autograd.grad(loss, list(routers.values()))
    return {layer: gradient.norm().item() for layer, gradient in zip(routers, gradients, strict=True)}


MAX_LOSSES_WITHOUT = 64
"""Experts, over all layers, up to which each is removed in turn."""


@torch.no_grad()
def _losses_without(model: GPT, windows: Windows, config: JobConfig) -> dict[int, list[float]] | None:
    """{layer: loss with expert e's output removed, for each e}, on at most 2,048 tokens; None for too many experts."""
    if len(model.moe_layers) * config.n_experts > MAX_LOSSES_WITHOUT:
        return None
    batch = list(range(min(windows.count, max(1, 2048 // windows.length))))
    inputs_BT, targets_BT = windows.batch(batch)
    n_targets = windows.n_targets(batch)

    def loss(layer: int, expert: int) -> float:
        logits_BTV = model(inputs_BT, without=(layer, expert)).logits_BTV
        return token_losses(logits_BTV, targets_BT).double().sum().item() / n_targets

    return {layer: [loss(layer, expert) for expert in range(config.n_experts)] for layer in model.moe_layers}
