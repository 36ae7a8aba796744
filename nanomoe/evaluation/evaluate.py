"""Measure a checkpoint's metrics, which `nanomoe.evaluation.metrics` declares.

Whoever loads the weights can recompute every metric. Knows no optimizer, no file and no clock.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nanomoe.config import JobConfig, SamplingConfig
from nanomoe.data import IGNORE, Windows
from nanomoe.evaluation.evaluated_text import EvaluatedText, RaiseIfStopped, go_on
from nanomoe.evaluation.metrics import (
    CheckpointMetrics,
    Continuation,
    MixtureMetrics,
    Position,
    ReconstructedToken,
    Reconstruction,
    perplexity,
)
from nanomoe.evaluation.moe_metrics import LayerRouting, expert_cards, moe_metrics, moe_warnings
from nanomoe.generation.continuation import continue_tokens
from nanomoe.model.gpt import GPT, token_losses
from nanomoe.tokenizer import Tokenizer

MAX_RECONSTRUCTED = 2048
"""Targets that a reconstruction holds."""

BATCH_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
"""Activations of a block that are held at once, by the kind of device: windows are evaluated together as long as these
fit. On a CPU a larger batch is no faster, 43,000 tokens a second and core at 768 tokens of 128 channels, 41,000 at
2,048 and at 8,192 (measured), and a stop is noticed between two batches. The bound on a GPU is assumed."""

LOGITS_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
"""Logits that are held at once, by the kind of device. On a CPU larger blocks are slower: of tokens with 8,192 logits
26,000 a second and core in blocks of 1 and of 4 MB, 19,000 in 16 MB, 15,000 in 64 MB (measured). The bound on a GPU is
assumed."""

Choices = dict[int, Tensor]
"""{layer: (targets, K) int16}: the experts of each token whose successor is a target that is read, in the text's order.

Row i is the routing of the token at `EvaluatedText.positions()[i]`, which is i where the whole text is read: what
`routing.safetensors` holds, and `churn` compares."""


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


def _windows_per_batch(model: GPT, windows: Windows) -> int:
    """The number of windows whose activations of one block `BATCH_BYTES` hold; at least one."""
    config = model.config
    hidden = max(4 * config.n_embd, (config.k + config.n_shared_experts) * config.expert_hidden * config.use_moe)
    token_bytes = 4 * (8 * config.n_embd + hidden)
    return max(1, BATCH_BYTES[windows.device.type] // (token_bytes * windows.length))


def _logits_in_blocks(model: GPT, hidden_BTC: Tensor, targets_BT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (N, V) and targets (N,) of as many tokens at a time as `LOGITS_BYTES` hold, at least one."""
    at_once = max(1, LOGITS_BYTES[hidden_BTC.device.type] // (4 * model.vocab_size))
    hidden, targets = hidden_BTC.flatten(0, 1).split(at_once), targets_BT.flatten().split(at_once)
    for hidden_NC, targets_N in zip(hidden, targets, strict=True):
        yield model.logits(hidden_NC), targets_N


def _losses(model: GPT, hidden_BTC: Tensor, targets_BT: Tensor) -> Tensor:
    """The loss (B, T) of each target, 0 where it is ignored."""
    blocks = _logits_in_blocks(model, hidden_BTC, targets_BT)
    losses = [token_losses(logits_NV[None], targets_N[None])[0] for logits_NV, targets_N in blocks]
    return torch.cat(losses).view_as(targets_BT)


def _losses_and_predictions(model: GPT, hidden_BTC: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """`_losses`, and the likeliest token (B, T) in place of each target."""
    losses: list[Tensor] = []
    predicted: list[Tensor] = []
    for logits_NV, targets_N in _logits_in_blocks(model, hidden_BTC, targets_BT):
        losses.append(token_losses(logits_NV[None], targets_N[None])[0])
        predicted.append(logits_NV.argmax(-1))
    return torch.cat(losses).view_as(targets_BT), torch.cat(predicted).view_as(targets_BT)


@torch.no_grad()
def evaluate_loss(model: GPT, text: EvaluatedText, raise_if_stopped: RaiseIfStopped = go_on) -> float:
    """Mean cross-entropy of the targets that are read of `text`, nats per token. `raise_if_stopped` is called before
    every batch."""
    windows = text.all_windows
    total = 0.0
    with _evaluating(model):
        for batch in text.batches(_windows_per_batch(model, windows)):
            raise_if_stopped()
            inputs_BT, targets_BT = windows.batch(batch)
            hidden_BTC, _ = model.hidden(inputs_BT)
            total += _losses(model, hidden_BTC, targets_BT).double().sum().item()
    return total / text.n_targets


def evaluate(
    model: GPT,
    text: EvaluatedText,
    val_text: EvaluatedText | None,
    tokenizer: Tokenizer,
    config: JobConfig,
    *,
    position: Position,
    previous_choices: Choices,
    train_loss: float | None,
    train_dropped: dict[int, float],
    raise_if_stopped: RaiseIfStopped = go_on,
) -> Evaluation:
    """All metrics of the model as it stands, at `position` of its training.

    `text` is the training text, `val_text` the one held out. `raise_if_stopped` is called between two batches.

    `previous_choices`: those of the checkpoint before, empty at percent 0. `train_dropped`: per MoE layer, the share
    of assignments that the training steps since then dropped.
    """
    with _evaluating(model):
        windows = text.all_windows
        read = _read(model, windows, text.windows, raise_if_stopped)
        tokens = windows.tokens
        inputs = text.positions().tolist()
        targets = [tokens[i + 1] for i in inputs]
        loss = sum(read.losses) / len(targets)
        n_bytes = sum(len(tokenizer.token_bytes(target)) for target in targets)
        metrics = CheckpointMetrics(
            **dict(position),
            loss=loss,
            perplexity=perplexity(loss),
            bits_per_byte=sum(read.losses) / math.log(2) / n_bytes,
            train_loss=train_loss,
            accuracy=sum(p == t for p, t in zip(read.predicted, targets, strict=True)) / len(targets),
            val_loss=evaluate_loss(model, val_text, raise_if_stopped) if val_text is not None else None,
            baselines=text.baselines(tokenizer.vocab_size, raise_if_stopped),
            eval_targets=len(targets),
            loss_stderr=text.standard_error(read.losses),
            reconstruction=_reconstruction(
                tokens,
                read if text.is_whole else _read(model, windows, _first_windows(windows), raise_if_stopped),
                tokenizer,
            ),
            continuation=_continuation(model, tokens, tokenizer, config, raise_if_stopped),
            moe=_moe(
                model,
                windows,
                read,
                [tokens[i] for i in inputs],
                tokenizer,
                config,
                previous_choices,
                train_dropped,
                raise_if_stopped,
            ),
        )
    return Evaluation(metrics, {layer: r.chosen_TK.to("cpu", torch.int16) for layer, r in read.routing.items()})


def _moe(
    model: GPT,
    windows: Windows,
    read: "_Reading",
    inputs: list[int],
    tokenizer: Tokenizer,
    config: JobConfig,
    previous_choices: Choices,
    train_dropped: dict[int, float],
    raise_if_stopped: RaiseIfStopped,
) -> MixtureMetrics | None:
    """How the experts share the work on the tokens `inputs`, whose routing `read` has; None for a dense model."""
    if not read.routing:
        return None
    return moe_metrics(
        read.routing,
        config,
        tokens_per_batch=min(windows.count, config.batch_size) * windows.length,
        previous_choices=previous_choices,
        train_dropped=train_dropped,
        router_grad_norms=_router_grad_norms(model, windows),
        losses_without=_losses_without(model, windows, config, raise_if_stopped),
        cards={
            layer: expert_cards(routing.chosen_TK, inputs, config.n_experts, tokenizer)
            for layer, routing in read.routing.items()
        },
    )


@dataclass(frozen=True)
class _Reading:
    """The model's losses, predictions and routing at every target of some windows, in the text's order."""

    losses: list[float]
    predicted: list[int]
    routing: dict[int, LayerRouting]
    """{layer: routing of the tokens that have a target}."""


@torch.no_grad()
def _read(model: GPT, windows: Windows, chosen: list[int], raise_if_stopped: RaiseIfStopped) -> _Reading:
    """Read the windows `chosen`, ascending."""
    per_batch = _windows_per_batch(model, windows)
    losses: list[float] = []
    predicted: list[int] = []
    parts: dict[int, list[LayerRouting]] = {layer: [] for layer in model.moe_layers}
    for first in range(0, len(chosen), per_batch):
        raise_if_stopped()
        inputs_BT, targets_BT = windows.batch(chosen[first : first + per_batch])
        hidden_BTC, routings = model.hidden(inputs_BT)
        losses_BT, predicted_BT = _losses_and_predictions(model, hidden_BTC, targets_BT)
        real_BT = targets_BT != IGNORE
        losses += losses_BT[real_BT].tolist()
        predicted += predicted_BT[real_BT].tolist()
        for layer, routing in routings.items():
            parts[layer].append(LayerRouting.of(routing, real_BT.flatten()))
    return _Reading(losses, predicted, {layer: LayerRouting.join(rows) for layer, rows in parts.items()})


def _first_windows(windows: Windows) -> list[int]:
    """The windows that hold the targets of a reconstruction."""
    return list(range(min(windows.count, -(-MAX_RECONSTRUCTED // windows.length))))


def _reconstruction(tokens: list[int], read: _Reading, tokenizer: Tokenizer) -> Reconstruction:
    """The model's prediction in place of every target: the first `MAX_RECONSTRUCTED` of them, which `read` begins with.

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


def _continuation(
    model: GPT, tokens: list[int], tokenizer: Tokenizer, config: JobConfig, raise_if_stopped: RaiseIfStopped
) -> Continuation:
    """What the model adds to the text's first tokens."""
    prompt = tokens[: config.cont_prefix_tokens]
    added = continue_tokens(
        model,
        prompt,
        max_new_tokens=config.cont_max_new_tokens,
        how=SamplingConfig(temperature=config.temperature, top_k=config.top_k),
        seed=config.seed,
        expected=tokens[len(prompt) : len(prompt) + config.cont_max_new_tokens],
        before_pass=raise_if_stopped,
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
def _losses_without(
    model: GPT, windows: Windows, config: JobConfig, raise_if_stopped: RaiseIfStopped
) -> dict[int, list[float]] | None:
    """{layer: loss with expert e's output removed, for each e}, on at most 2,048 tokens; None for too many experts."""
    if len(model.moe_layers) * config.n_experts > MAX_LOSSES_WITHOUT:
        return None
    batch = list(range(min(windows.count, max(1, 2048 // windows.length))))
    inputs_BT, targets_BT = windows.batch(batch)
    n_targets = windows.n_targets(batch)

    def loss(layer: int, expert: int) -> float:
        raise_if_stopped()
        hidden_BTC, _ = model.hidden(inputs_BT, without=(layer, expert))
        return _losses(model, hidden_BTC, targets_BT).double().sum().item() / n_targets

    return {layer: [loss(layer, expert) for expert in range(config.n_experts)] for layer in model.moe_layers}
