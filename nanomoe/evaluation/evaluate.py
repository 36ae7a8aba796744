"""Measure a checkpoint's metrics, which `nanomoe.evaluation.metrics` declares.

Whoever loads the weights can recompute every metric. Knows no optimizer, no file and no clock.
"""

import math
import operator
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nanomoe.config import JobConfig, SamplingConfig
from nanomoe.data import Windows
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
from nanomoe.evaluation.moe_metrics import expert_cards, moe_metrics, moe_warnings
from nanomoe.evaluation.reader import PlainReader, Reader, Reading, evaluating
from nanomoe.generation.continuation import continue_tokens
from nanomoe.model.gpt import GPT, token_losses
from nanomoe.tokenizer import Tokenizer

MAX_RECONSTRUCTED = 2048
"""Targets that a reconstruction holds."""

MAX_LOSSES_WITHOUT = 64
"""Experts, over all layers, up to which each is removed in turn."""

MOST_TOKENS_WITHOUT = 2048
"""Tokens that are read with an expert removed."""

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


def evaluate_loss(reader: Reader, text: EvaluatedText, raise_if_stopped: RaiseIfStopped = go_on) -> float:
    """Mean cross-entropy of the targets that are read of `text`, nats per token. `raise_if_stopped` is called before
    every batch."""
    read = reader.read(text.all_windows, text.windows, raise_if_stopped)
    return read.total / len(read.losses)


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
    reader: Reader | None = None,
    raise_if_stopped: RaiseIfStopped = go_on,
) -> Evaluation:
    """All metrics of the model as it stands, at `position` of its training.

    `text` is the training text, `val_text` the one held out. `reader` passes their windows through the model, the plain
    one where it is None. `raise_if_stopped` is called between two batches.

    `previous_choices`: those of the checkpoint before, empty at percent 0. `train_dropped`: per MoE layer, the share
    of assignments that the training steps since then dropped.
    """
    measured = measure(model, text, val_text, config, reader or PlainReader(model), raise_if_stopped)
    return evaluation_of(
        measured,
        text,
        tokenizer,
        config,
        position=position,
        previous_choices=previous_choices,
        train_loss=train_loss,
        train_dropped=train_dropped,
        raise_if_stopped=raise_if_stopped,
    )


@dataclass(frozen=True)
class Measured:
    """What a model gives in all passes of an evaluation: no more is needed of the weights."""

    read: Reading
    """The windows of the training text that evaluations read."""
    beginning: Reading | None
    """Those that a reconstruction shows and `read` has not; None where there are none."""
    val_loss: float | None
    """Loss of the text held out; None where there is none."""
    added: list[int]
    """New tokens of the continuation."""
    router_grad_norms: dict[int, float]
    """{MoE layer: norm of the cross-entropy's gradient at its router's weight}, on window 0 without dropout."""
    losses_without: dict[int, list[float]] | None
    """{MoE layer: loss with expert e's output removed, for each e}, on the first `MOST_TOKENS_WITHOUT` tokens; None
    where that is not done."""


def measure(
    model: GPT,
    text: EvaluatedText,
    val_text: EvaluatedText | None,
    config: JobConfig,
    reader: Reader,
    raise_if_stopped: RaiseIfStopped = go_on,
) -> Measured:
    """Pass the texts through the model as it stands; arguments as of `evaluate`."""
    windows = text.all_windows
    with evaluating(model):
        read = reader.read(windows, text.windows, raise_if_stopped)
        val_loss = None if val_text is None else evaluate_loss(reader, val_text, raise_if_stopped)
        missing = windows_of_beginning(text)
        beginning = reader.read(windows, missing, raise_if_stopped) if missing else None
        prompt, expected = continued(windows.tokens, config)
        added = continue_tokens(
            model,
            prompt,
            max_new_tokens=config.cont_max_new_tokens,
            how=SamplingConfig(temperature=config.temperature, top_k=config.top_k),
            seed=config.seed,
            expected=expected,
            before_pass=raise_if_stopped,
        )
        without = windows_without(windows, config)
        return Measured(
            read,
            beginning,
            val_loss,
            added,
            router_grad_norms=_router_grad_norms(model, windows) if model.moe_layers else {},
            losses_without=None if without is None else reader.losses_without(windows, without, raise_if_stopped),
        )


def evaluation_of(
    measured: Measured,
    text: EvaluatedText,
    tokenizer: Tokenizer,
    config: JobConfig,
    *,
    position: Position,
    previous_choices: Choices,
    train_loss: float | None,
    train_dropped: dict[int, float],
    raise_if_stopped: RaiseIfStopped = go_on,
) -> Evaluation:
    """The metrics that follow from what was measured; arguments as of `evaluate`."""
    read, tokens = measured.read, text.all_windows.tokens
    positions = text.positions().tolist()
    targets = [tokens[i + 1] for i in positions]
    loss = read.total / len(targets)
    n_bytes = sum(n * len(tokenizer.token_bytes(target)) for target, n in Counter(targets).items())
    prompt, _ = continued(tokens, config)
    metrics = CheckpointMetrics(
        **dict(position),
        loss=loss,
        perplexity=perplexity(loss),
        bits_per_byte=read.total / math.log(2) / n_bytes,
        train_loss=train_loss,
        accuracy=sum(map(operator.eq, read.predicted, targets)) / len(targets),
        val_loss=measured.val_loss,
        baselines=text.baselines(tokenizer.vocab_size, raise_if_stopped),
        eval_targets=len(targets),
        loss_stderr=text.standard_error(read.losses),
        reconstruction=_reconstruction(tokens, _beginning(text.all_windows, read, measured.beginning), tokenizer),
        continuation=Continuation(prompt=tokenizer.decode(prompt), text=tokenizer.decode(measured.added)),
        moe=_moe(measured, text, [tokens[i] for i in positions], tokenizer, config, previous_choices, train_dropped),
    )
    return Evaluation(metrics, {layer: r.chosen_TK.to("cpu", torch.int16) for layer, r in read.routing.items()})


def _moe(
    measured: Measured,
    text: EvaluatedText,
    inputs: list[int],
    tokenizer: Tokenizer,
    config: JobConfig,
    previous_choices: Choices,
    train_dropped: dict[int, float],
) -> MixtureMetrics | None:
    """How the experts share the work on the tokens `inputs`, whose routing was read; None for a dense model."""
    routing, windows = measured.read.routing, text.all_windows
    if not routing:
        return None
    return moe_metrics(
        routing,
        config,
        tokens_per_batch=min(windows.count, config.batch_size) * windows.length,
        previous_choices=previous_choices,
        train_dropped=train_dropped,
        router_grad_norms=measured.router_grad_norms,
        losses_without=measured.losses_without,
        cards={
            layer: expert_cards(routed.chosen_TK, inputs, config.n_experts, tokenizer)
            for layer, routed in routing.items()
        },
    )


def continued(tokens: list[int], config: JobConfig) -> tuple[list[int], list[int]]:
    """The text's first tokens, to which the model adds, and those that follow them in the text."""
    n = config.cont_prefix_tokens
    return tokens[:n], tokens[n : n + config.cont_max_new_tokens]


def windows_of_beginning(text: EvaluatedText) -> list[int]:
    """The windows that a reconstruction shows and evaluations do not read anyway."""
    windows = text.all_windows
    shown = range(min(windows.count, -(-MAX_RECONSTRUCTED // windows.length)))
    return [] if text.is_whole else sorted({*shown} - {*text.windows})


def windows_without(windows: Windows, config: JobConfig) -> range | None:
    """The windows that are read with each expert's output removed; None where that is not done: there is no expert, or
    there are too many."""
    if not 0 < len(config.moe_layers) * config.n_experts <= MAX_LOSSES_WITHOUT:
        return None
    return range(min(windows.count, max(1, MOST_TOKENS_WITHOUT // windows.length)))


class _Beginning(NamedTuple):
    """What was read at the text's first targets, at least as many as a reconstruction shows."""

    losses: list[float]
    predicted: list[int]
    chosen: list[list[list[int]]]
    """Per MoE layer, each token's experts."""


def _beginning(windows: Windows, read: Reading, missing: Reading | None) -> _Beginning:
    """The windows that a reconstruction shows: taken from `read`, and from `missing` where they are not in it."""
    first = range(min(windows.count, -(-MAX_RECONSTRUCTED // windows.length)))
    readings = [read] if missing is None else [read, missing]
    places = {window: (reading, place) for reading in readings for window, place in reading.places().items()}
    parts = [places[window] for window in first]
    return _Beginning(
        losses=[loss for source, place in parts for loss in source.losses[place]],
        predicted=[token for source, place in parts for token in source.predicted[place]],
        chosen=[
            torch.cat([source.routing[layer].chosen_TK[place] for source, place in parts]).tolist()
            for layer in read.routing
        ],
    )


def _reconstruction(tokens: list[int], beginning: _Beginning, tokenizer: Tokenizer) -> Reconstruction:
    """The model's prediction in place of every target: the first `MAX_RECONSTRUCTED` of them.

    Position i holds the token that was seen and routed there, `input`, and what was predicted after it: `experts` are
    those of `input`, `target` is the token that follows it.
    """
    shown = min(len(tokens) - 1, MAX_RECONSTRUCTED)
    predicted = beginning.predicted[:shown]
    text_of = {token: tokenizer.decode([token]) for token in {*tokens[: shown + 1], *predicted}}
    entries = []
    byte_offset = len(tokenizer.token_bytes(tokens[0]))
    for i, target in enumerate(tokens[1 : shown + 1]):
        experts = {"experts": [layer[i] for layer in beginning.chosen]} if beginning.chosen else {}
        entries.append(
            ReconstructedToken(
                input=text_of[tokens[i]],
                target=text_of[target],
                predicted=text_of[predicted[i]],
                loss=beginning.losses[i],
                id=target,
                byte_offset=byte_offset,
                **experts,
            )
        )
        byte_offset += len(tokenizer.token_bytes(target))
    return Reconstruction(text=tokenizer.decode(predicted), tokens=entries, truncated=shown < len(tokens) - 1)


def _router_grad_norms(model: GPT, windows: Windows) -> dict[int, float]:
    """Norm of the cross-entropy's gradient at each router's weight, on window 0 without dropout: 0 is a dead router."""
    inputs_BT, targets_BT = windows.batch([0])
    loss = token_losses(model(inputs_BT).logits_BTV, targets_BT).sum() / windows.n_targets([0])
    routers = {layer: moe.router.weight for layer, moe in model.moe_layers.items()}
    gradients = torch.autograd.grad(loss, list(routers.values()))
    return {layer: gradient.norm().item() for layer, gradient in zip(routers, gradients, strict=True)}
