"""The training loop: a generator that yields what happened, and goes on when its caller has dealt with it.

Knows no database, no HTTP and no folder: a checkpoint is yielded as the bytes of its files. The weights do not change
while the caller holds what was yielded. Everything that a resumed run needs is in a `Snapshot`; data order, dropout
and router noise are pure functions of (seed, step), so there is no random state to carry over.
"""

import gc
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from nanomoe import checkpoint
from nanomoe.config import JobConfig
from nanomoe.data import Order, Step, Windows
from nanomoe.dropout import Dropout
from nanomoe.evaluate import Choices, Evaluation, evaluate, evaluate_loss
from nanomoe.execution import Execution
from nanomoe.model import GPT, token_losses
from nanomoe.optim import build_optimizer, learning_rate
from nanomoe.plan import Plan
from nanomoe.tokenizer import Tokenizer

REPORT_SECONDS = 0.25
"""Step figures are gathered this long before they are yielded: reading them waits for the device."""

Weights = Mapping[str, Tensor]
StopReason = Literal["cancel", "pause", "drain"]


class LossNotFinite(ArithmeticError):
    """The loss or the gradient is NaN or infinite; nothing after the last good step was yielded."""

    code = "loss_not_finite"


class OutOfMemory(RuntimeError):
    """A step does not fit the memory, however it is cut."""

    code = "out_of_memory"


def _is_out_of_memory(error: RuntimeError) -> bool:
    """On a GPU torch has a class for it; on a CPU only a message."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@dataclass(frozen=True)
class Steps:
    """The figures of consecutive optimizer steps, column by column."""

    step: list[int]
    """From 1."""
    train_loss: list[float]
    """Cross-entropy of the step's targets with dropout on, nats per token, no auxiliary loss in it."""
    lr: list[float]
    grad_norm: list[float]
    """Norm of the whole gradient, before clipping."""
    epoch: int
    """Of the last of them."""
    tok_per_sec: float
    """Targets trained on per second."""


@dataclass(frozen=True)
class Recorded:
    """A checkpoint: what a quarter of the training leaves to read."""

    percent: int
    step: int
    epoch: int
    metrics: dict[str, Any]
    tok_per_sec: float | None
    """Targets per second since the last checkpoint, its evaluation not counted; None before the first step."""
    files: dict[str, bytes]


@dataclass(frozen=True)
class Snapshot:
    """Everything that is needed to go on from `step` as if nothing had happened."""

    step: int
    files: dict[str, bytes]


@dataclass(frozen=True)
class Warned:
    """Something that the user should know, while training goes on."""

    code: str
    message: str


@dataclass(frozen=True)
class Stopped:
    """The caller asked for a stop; the snapshot before it, if there was one to take, is where it would go on."""

    reason: StopReason
    step: int


Happened = Steps | Recorded | Snapshot | Warned | Stopped


class Control(Protocol):
    """What the caller wants, asked between steps."""

    def stop(self) -> StopReason | None:
        """Why training should stop now, or None."""

    def snapshot_due(self) -> bool:
        """Whether a rolling snapshot should be taken now."""


class Undisturbed:
    """Never stops, takes no rolling snapshot."""

    def stop(self) -> StopReason | None:
        return None

    def snapshot_due(self) -> bool:
        return False


@dataclass
class _Progress:
    """What has been counted: all of a run's state beside weights and optimizer."""

    micro_batch: int
    """Windows computed together: the config's batch_size, until memory runs out."""
    step: int = 0
    train_loss: float | None = None
    """Of the last step."""
    routed: int = 0
    """Assignments of tokens to experts per MoE layer since the last checkpoint."""
    dropped: dict[int, Tensor] = field(default_factory=dict)
    """Of those, how many each MoE layer dropped: 0-dim int64 on the device."""
    choices: Choices = field(default_factory=dict)
    """Each token's experts at the last checkpoint."""


class Run:
    """A model in training: its weights, its optimizer, its data, and what has been counted."""

    def __init__(
        self,
        config: JobConfig,
        tokens: list[int],
        tokenizer: Tokenizer,
        execution: Execution,
        *,
        device: torch.device,
        parent: Weights | None = None,
        resume: Mapping[str, bytes] | None = None,
    ) -> None:
        """`parent`: weights to start from instead of random ones. `resume`: the files of a `Snapshot`."""
        self.config = config
        self.tokenizer = tokenizer
        self.device = device
        self.plan = Plan.of(config, len(tokens))
        text = torch.tensor(tokens, device=device)
        self.windows = Windows(text[: self.plan.n_train_tokens], config.block_size)
        self.val_windows = (
            Windows(text[self.plan.n_train_tokens :], config.block_size) if self.plan.n_val_tokens else None
        )
        self.order = Order(config, self.plan)
        self.activations = torch.bfloat16 if execution.precision == "bfloat16" else torch.float32
        self.model = GPT.build(config, tokenizer.vocab_size, device)
        if resume is not None:
            self.model.load_state_dict(load_tensors(resume[checkpoint.WEIGHTS]))
        elif parent is not None:
            self.model.load_state_dict(parent)
        else:
            self.model.init_weights(config.seed)
        for moe in self.model.moe_layers.values():
            moe.path = execution.expert_path
        self.optimizer = build_optimizer(self.model, config)
        self.warnings: list[Warned] = []
        """What the steps so far gave rise to; whoever reads them clears them."""
        self.progress = _Progress(
            config.batch_size,
            dropped={layer: torch.zeros((), dtype=torch.int64, device=device) for layer in config.moe_layers},
        )
        if resume is not None:
            self._load(resume)

    def train_step(self) -> tuple[Tensor, Tensor]:
        """Do one optimizer step; its cross-entropy (nats per target, dropout on) and gradient norm, 0-dim, unread.

        The gradient is that of the sum of the targets' losses over their number in the whole step, however the step is
        cut into micro-batches; auxiliary losses are weighted by each micro-batch's share of the targets.
        """
        index = self.progress.step
        step = self.order.step(index)
        lr = learning_rate(self.config, index, self.plan.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        loss, counts, dropped = self._gradient(step)
        grad_norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.model.parameters() if p.grad is not None], foreach=True
        )
        if self.config.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.grad_clip, grad_norm)
        self.optimizer.step()
        for layer, moe in self.model.moe_layers.items():
            moe.update_balance_bias(counts[layer])
            self.progress.dropped[layer] += dropped[layer]
        self.progress.routed += len(step.windows) * self.windows.length * self.config.k
        self.progress.step += 1
        return loss, grad_norm

    def _gradient(self, step: Step) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
        """Set the step's gradient; its loss, and per MoE layer the assignments to each expert and those dropped.

        Where the memory does not hold a micro-batch, it is halved and the step computed again: the sum is the same.

        Raises:
            OutOfMemory: a micro-batch cannot be halved.
        """
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            n_targets = self.windows.n_targets(step.windows)
            loss = torch.zeros((), device=self.device)
            counts: dict[int, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.int64, device=self.device))
            dropped = counts.copy()
            try:
                for windows in step.micro_batches(self.progress.micro_batch):
                    loss += self._backward(windows, n_targets, counts, dropped)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                self._halve_micro_batch(error)
            else:
                return loss, counts, dropped

    def _halve_micro_batch(self, error: RuntimeError) -> None:
        size = min(self.progress.micro_batch, self.plan.n_windows)
        if size == 1:
            raise OutOfMemory(f"not even one window of {self.windows.length} tokens fits: {error}") from error
        if self.config.capacity_factor is not None:
            raise OutOfMemory(
                f"a micro-batch of {size} windows does not fit, and with capacity_factor a smaller one would drop "
                f"other tokens: {error}"
            ) from error
        self.progress.micro_batch = -(-size // 2)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.warnings += [
            Warned(
                "micro_batch_halved",
                f"at step {self.progress.step + 1} a micro-batch of {size} windows did not fit the memory; from there "
                f"on it has {self.progress.micro_batch}: a step trains on the same windows in more parts",
            ),
            Warned("resume_not_exact", "sums over smaller micro-batches are rounded otherwise"),
        ]

    def _backward(
        self, windows: list[int], n_targets: int, counts: dict[int, Tensor], dropped: dict[int, Tensor]
    ) -> Tensor:
        """Add one micro-batch's gradient and counts; its part of the loss of a step of `n_targets`."""
        config = self.config
        inputs_BT, targets_BT = self.windows.batch(windows)
        dropout = Dropout(
            config.dropout,
            seed=config.seed,
            step=self.progress.step,
            windows=windows,
            device=self.device,
            dtype=self.activations,
        )
        with self._autocast():
            logits_BTV, routings = self.model(inputs_BT, dropout=dropout)
        loss = token_losses(logits_BTV, targets_BT).sum() / n_targets
        objective = loss
        share = self.windows.n_targets(windows) / n_targets
        for layer, routing in routings.items():
            balance = config.router_aux_loss_coef * routing.aux_loss + config.router_z_loss_coef * routing.z_loss
            objective = objective + balance * share
            counts[layer] = counts[layer] + routing.counts_E
            dropped[layer] = dropped[layer] + routing.dropped
        torch.autograd.backward(objective)
        return loss.detach()

    def _autocast(self) -> AbstractContextManager[object]:
        if self.activations == torch.float32:
            return nullcontext()
        # Every weight is used once a step: a cache of cast weights would only hold memory.
        return torch.autocast(self.device.type, dtype=self.activations, cache_enabled=False)

    def evaluate_loss(self) -> float:
        """The loss of the training text: dropout off, float32, nats per token."""
        return evaluate_loss(self.model, self.windows)

    def record(self, percent: int, *, stopped_early: bool, tok_per_sec: float | None) -> tuple[Recorded, list[Warned]]:
        """Evaluate, and gather the checkpoint's files and the warnings that its metrics give rise to."""
        progress = self.progress
        evaluation: Evaluation = evaluate(
            self.model,
            self.windows,
            self.val_windows,
            self.tokenizer,
            self.config,
            previous_choices=progress.choices,
            train_loss=progress.train_loss,
            train_dropped={layer: int(n) / max(1, progress.routed) for layer, n in progress.dropped.items()},
        )
        metrics = evaluation.metrics | ({"stopped_early": True} if stopped_early else {})
        files = self._model_files() | {
            checkpoint.METRICS: checkpoint.to_json(
                {"percent": percent, "step": progress.step, "epoch": self.plan.epoch_of(progress.step)} | metrics
            )
        }
        if evaluation.choices:
            files[checkpoint.ROUTING] = save_tensors({f"layer.{n}": c for n, c in evaluation.choices.items()})
        progress.choices = evaluation.choices
        progress.routed = 0
        for dropped in progress.dropped.values():
            dropped.zero_()
        recorded = Recorded(percent, progress.step, self.plan.epoch_of(progress.step), metrics, tok_per_sec, files)
        late = progress.step > self.plan.total_steps / 2
        return recorded, [Warned(code, message) for code, message in evaluation.warnings(after_half=late)]

    def snapshot(self) -> Snapshot:
        """The state after the last step."""
        progress = self.progress
        tensors = {f"dropped.{layer}": n for layer, n in progress.dropped.items()}
        tensors |= {f"choices.{layer}": chosen for layer, chosen in progress.choices.items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        state = {name: getattr(progress, name) for name in ("micro_batch", "step", "train_loss", "routed")}
        files = self._model_files() | {
            checkpoint.RESUME_TENSORS: save_tensors({name: t.cpu().contiguous() for name, t in tensors.items()}),
            checkpoint.RESUME_STATE: checkpoint.to_json(state),
        }
        return Snapshot(progress.step, files)

    def _load(self, files: Mapping[str, bytes]) -> None:
        state = json.loads(files[checkpoint.RESUME_STATE])
        tensors = load_tensors(files[checkpoint.RESUME_TENSORS])
        progress = self.progress
        for name, value in state.items():
            setattr(progress, name, value)
        for layer, dropped in progress.dropped.items():
            dropped.copy_(tensors[f"dropped.{layer}"])
        progress.choices = {n: tensors[f"choices.{n}"] for n in self.config.moe_layers if f"choices.{n}" in tensors}
        for name, parameter in self.model.named_parameters():
            self.optimizer.state[parameter] = {
                key: tensors[f"{key}.{name}"].to(self.device) for key in ("step", "exp_avg", "exp_avg_sq")
            }

    def _model_files(self) -> dict[str, bytes]:
        weights = {name: tensor.cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        return {
            checkpoint.WEIGHTS: save_tensors(weights),
            checkpoint.CONFIG: checkpoint.to_json(self.config.model_dump(mode="json")),
            **self.tokenizer.files(),
        }


def train(run: Run, control: Control | None = None) -> Iterator[Happened]:
    """Train to the end of the plan, from wherever `run` stands.

    Raises:
        LossNotFinite: at the step where it was seen.
    """
    control = control or Undisturbed()
    quarters = run.plan.quarters
    report = _Report(run)
    stop_at = run.config.stop_at_perplexity
    eval_interval = run.config.eval_interval or run.plan.steps_per_epoch
    if run.progress.step == 0:
        yield from _record(run, 0, report)
    while run.progress.step < run.plan.total_steps:
        reason = control.stop()
        if reason is not None:
            yield from report.flush()
            if reason != "cancel" and run.progress.step > 0:
                yield run.snapshot()
            yield Stopped(reason, run.progress.step)
            return
        report.add(*run.train_step())
        step = run.progress.step
        yield from run.warnings
        run.warnings.clear()
        if report.due():
            yield from report.flush()
        if stop_at is not None and step % eval_interval == 0 and math.exp(run.evaluate_loss()) <= stop_at:
            yield from report.flush()
            yield from _record(run, 100, report, stopped_early=step < run.plan.total_steps)
            return
        if step in quarters:
            yield from report.flush()
            yield from _record(run, quarters[step], report)
            if step < run.plan.total_steps:
                yield run.snapshot()
        elif control.snapshot_due():
            yield from report.flush()
            yield run.snapshot()


def _record(run: Run, percent: int, report: "_Report", *, stopped_early: bool = False) -> Iterator[Happened]:
    recorded, warnings = run.record(percent, stopped_early=stopped_early, tok_per_sec=report.speed_since_checkpoint())
    yield recorded
    yield from warnings
    report.restart_clock()


class _Report:
    """Gathers step figures on the device, and reads them together."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._figures: list[tuple[Tensor, Tensor]] = []
        self._lr: list[float] = []
        self._targets = 0
        self._quarter_targets = 0
        self._quarter_seconds = 0.0
        self._since = time.monotonic()

    def add(self, loss: Tensor, grad_norm: Tensor) -> None:
        self._figures.append((loss, grad_norm))
        self._lr.append(self._run.optimizer.param_groups[0]["lr"])
        step = self._run.order.step(self._run.progress.step - 1)
        self._targets += self._run.windows.n_targets(step.windows)

    def due(self) -> bool:
        return time.monotonic() - self._since >= REPORT_SECONDS

    def flush(self) -> Iterator[Steps]:
        """Yield the gathered figures, if there are any.

        Raises:
            LossNotFinite: at the first step that is not; the steps before it are yielded first.
        """
        if not self._figures:
            return
        losses, norms = torch.stack([torch.stack(pair).float() for pair in self._figures]).T.tolist()
        seconds = time.monotonic() - self._since
        last = self._run.progress.step
        first = last - len(losses) + 1
        good = next(
            (i for i, pair in enumerate(zip(losses, norms, strict=True)) if not all(map(math.isfinite, pair))),
            len(losses),
        )
        if good:
            self._run.progress.train_loss = losses[good - 1]
            yield Steps(
                step=list(range(first, first + good)),
                train_loss=losses[:good],
                lr=self._lr[:good],
                grad_norm=norms[:good],
                epoch=self._run.plan.epoch_of(first + good - 1),
                tok_per_sec=self._targets / max(seconds, 1e-9),
            )
        if good < len(losses):
            raise LossNotFinite(
                f"at step {first + good} the loss is {losses[good]} and the gradient norm {norms[good]}; "
                "a lower lr, warmup_steps or grad_clip usually helps"
            )
        self._quarter_targets += self._targets
        self._quarter_seconds += seconds
        self._figures, self._lr, self._targets = [], [], 0
        self._since = time.monotonic()

    def speed_since_checkpoint(self) -> float | None:
        if not self._quarter_targets:
            return None
        return self._quarter_targets / max(self._quarter_seconds, 1e-9)

    def restart_clock(self) -> None:
        """Leave out what was spent on a checkpoint."""
        self._quarter_targets, self._quarter_seconds = 0, 0.0
        self._since = time.monotonic()
