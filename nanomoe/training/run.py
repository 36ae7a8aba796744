"""A model in training: one optimizer step, one checkpoint, one snapshot at a time.

Everything that a resumed run needs is in a `Snapshot`; data order, dropout and router noise are pure functions of
(seed, step), so there is no random state to carry over. Knows no loop, no clock and no folder.
"""

import copy
import gc
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from nanomoe import checkpoint
from nanomoe.config import ConfigWarning, JobConfig
from nanomoe.config_warnings import config_warnings
from nanomoe.data import Order, Step, Windows
from nanomoe.evaluation.evaluate import Choices, Measured, evaluate_loss, evaluation_of, measure
from nanomoe.evaluation.evaluated_text import EvaluatedText, RaiseIfStopped, go_on
from nanomoe.evaluation.metrics import CheckpointMetrics, Position
from nanomoe.evaluation.reader import PlainReader
from nanomoe.model.gpt import GPT
from nanomoe.model.upcycle import starting_weights
from nanomoe.plan import OutOfMemory, Plan
from nanomoe.tokenizer import Tokenizer
from nanomoe.training.early_stopping import EndingRule, Losses, ValidationHistory
from nanomoe.training.ending import Ending
from nanomoe.training.execution import Execution, find_device
from nanomoe.training.memory import is_out_of_memory
from nanomoe.training.optim import learning_rate
from nanomoe.training.steps.captured import CapturedStep
from nanomoe.training.steps.choice import StepPath, build_reader, build_step
from nanomoe.training.steps.eager import EagerStep
from nanomoe.training.steps.kept import Kept, KeptSteps, shape_of
from nanomoe.training.steps.stacked import Lane
from nanomoe.training.steps.step import CaptureFailed, Figures, Planned, TrainingStep

Key = TypeVar("Key")
Weights = Mapping[str, Tensor]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recorded:
    """A checkpoint: what a quarter of the training leaves to read."""

    metrics: CheckpointMetrics
    tok_per_sec: float | None
    """Targets per second since the last checkpoint, its evaluation not counted; None before the first step."""
    files: dict[str, bytes]
    """Content of each file by its name."""

    @property
    def percent(self) -> int:
        """Percent of the checkpoint."""
        return self.metrics.percent


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
    micro_batch: int | None = None
    """Where the code is `micro_batch_halved`: windows computed together from here on."""


@dataclass
class _Progress:
    """What has been counted: all of a run's state beside weights and optimizer."""

    micro_batch: int
    """Windows computed together: that of the execution, until memory runs out."""
    step: int = 0
    train_loss: float | None = None
    """Loss of the last step, dropout on."""
    routed: int = 0
    """Assignments of tokens to experts per MoE layer since the last checkpoint."""
    dropped: dict[int, Tensor] = field(default_factory=dict)
    """{layer: how many of the routed assignments it dropped}: 0-dim int64 on the device."""
    choices: Choices = field(default_factory=dict)
    """Each token's experts at the last checkpoint."""
    validation: ValidationHistory = field(default_factory=ValidationHistory)
    """What early stopping has seen."""
    evaluation_is_due: bool = False
    """Whether the evaluations after this step were not made yet: a stop may come between a step and them."""


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
        kept_steps: KeptSteps | None = None,
    ) -> None:
        """Prefer `prepare`, which decides the execution. `parent`: weights of a model of this config to start from
        instead of random ones. `resume`: the files of a `Snapshot`. `kept_steps`: those of earlier jobs."""
        self.config = config
        self.tokenizer = tokenizer
        self.device = device
        self.n_threads = execution.n_threads
        """Threads that share its steps on a CPU, which whoever advances it in another thread sets there."""
        self.plan = Plan.of(config, len(tokens))
        text = torch.tensor(tokens, device=device)
        self._kept_steps = kept_steps
        self._shape = shape_of(
            config,
            n_tokens=len(tokens),
            vocab_size=tokenizer.vocab_size,
            device=str(device),
            path=execution.path,
            precision_used=execution.precision,
            experts=execution.expert_path,
            recomputes=execution.recomputes_activations,
        )
        kept = None if kept_steps is None else kept_steps.take(self._shape)
        if kept is None:
            self.windows = Windows(text[: self.plan.n_train_tokens], config.block_size)
            self.model = GPT.build(config, tokenizer.vocab_size, device)
        else:
            self.model, self.windows = kept.model, kept.windows
            self.windows.overwrite(text[: self.plan.n_train_tokens])
        self.val_windows = (
            Windows(text[self.plan.n_train_tokens :], config.block_size) if self.plan.n_val_tokens else None
        )
        max_targets = self.plan.eval_max_tokens(config)
        self.text = EvaluatedText(self.windows, max_targets)
        """What evaluations read of the training text."""
        self.val_text = None if self.val_windows is None else EvaluatedText(self.val_windows, max_targets)
        """What evaluations read of the held-out text."""
        self.order = Order(config, self.plan)
        if resume is not None:
            self.model.load_state_dict(load_tensors(resume[checkpoint.WEIGHTS]))
        elif parent is not None:
            self.model.load_state_dict(parent)
        else:
            self.model.init_weights(config.seed)
        self.model.recomputes = execution.recomputes_activations
        for moe in self.model.moe_layers.values():
            moe.path = execution.expert_path
        self.activations = torch.bfloat16 if execution.precision == "bfloat16" else torch.float32
        """Type of activations and matrix products."""
        self.step: TrainingStep
        """The way in which an optimizer step is done."""
        if kept is None:
            self.step = build_step(execution.path, self.model, self.windows, config, self.activations)
        else:
            kept.step.restart(config.seed)
            self.step = kept.step
        self.path = execution.path
        """The way in which its first step was to be done."""
        self.reader = build_reader(self.path, self.model)
        """The way in which evaluations pass windows through the model."""
        self._ending = self._build_ending()
        """What may end training early; None where nothing does."""
        self.warnings: list[Warned] = []
        """What the steps so far gave rise to; whoever reads them clears them."""
        self.progress = self._nothing_counted(execution.micro_batch)
        self._order_ahead = Order(config, self.plan)
        self.step.look_ahead(self._planned)
        self._untrained: Weights | None = None
        """Those of the snapshot that this run goes on from, where percent 0 was not recorded before it."""
        self._frozen: Weights | None = None
        """Those of a copy whose model was not built yet."""
        if resume is not None:
            self._load(resume)

    def train_step(self) -> Figures:
        """Do one optimizer step; its cross-entropy (nats per target, dropout on) and gradient norm, 0-dim, unread.

        The gradient is that of the sum of the targets' losses over their number in the whole step, however the step is
        cut into micro-batches; auxiliary losses are weighted by each micro-batch's share of the targets.
        """
        index = self.progress.step
        step = self.order.step(index)
        self.step.lr = learning_rate(self.config, index, self.plan.total_steps)
        counts, dropped = self._gradient(step)
        figures = self.step.update()
        self.step.balance(self.model.moe_layers, counts)
        for layer in self.model.moe_layers:
            self.progress.dropped[layer] += dropped[layer]
        self.progress.routed += self._n_routed(step)
        self.progress.step += 1
        return figures

    def _n_routed(self, step: Step) -> int:
        """Assignments of a step's tokens to experts, per MoE layer."""
        return len(step.windows) * self.windows.length * self.config.k

    def keep_step(self) -> None:
        """Leave what was captured to the next job of this shape. This run is over then, and all that it evaluated."""
        if self._kept_steps is not None and isinstance(self.step, CapturedStep):
            self.step.restart(self.config.seed)  # nothing of this run is referred to any more
            self._kept_steps.put(self._shape, Kept(self.model, self.windows, self.step))

    def join(self, lane: Lane) -> None:
        """Have the steps from here on done by a program that trains other runs too."""
        lane.load(self.step.tensors())
        for layer, dropped in self.progress.dropped.items():
            lane.dropped[layer].copy_(dropped)
        self.progress.dropped = lane.dropped
        self.step = lane
        self.step.look_ahead(self._planned)
        self._ending = self._build_ending()

    def leave_program(self) -> None:
        """Have the program that trains other runs too do no more steps of this one, if there is one."""
        if isinstance(self.step, Lane):
            self.step.leave()

    def _planned(self, index: int) -> Planned | None:
        if index >= self.plan.total_steps:
            return None
        micro_batches = self._order_ahead.step(index).micro_batches(self.progress.micro_batch)
        return Planned(micro_batches, learning_rate(self.config, index, self.plan.total_steps))

    def _gradient(self, step: Step) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Set the step's gradient; per MoE layer the assignments to each expert and those dropped.

        Where the memory does not hold a micro-batch, it is halved and the step computed again: the sum is the same. So
        it is where the step cannot be captured, operator by operator.

        Raises:
            OutOfMemory: a micro-batch cannot be halved.
        """
        while True:
            n_targets = self.windows.n_targets(step.windows)
            counts: dict[int, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.int64, device=self.device))
            dropped = counts.copy()
            try:
                self.step.begin()
                for windows in step.micro_batches(self.progress.micro_batch):
                    self._backward(windows, n_targets, counts, dropped)
            except CaptureFailed as error:
                self._go_on_eagerly(error)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._halve_micro_batch(error)
            else:
                return counts, dropped

    def _go_on_eagerly(self, error: CaptureFailed) -> None:
        eager = EagerStep(self.model, self.windows, self.config, self.activations)
        eager.load(self.step.tensors())
        eager.lr = self.step.lr
        if isinstance(self.step, CapturedStep):
            eager.is_skipped = self.step.is_skipped
        self.step = eager
        message = f"from step {self.progress.step + 1} on, steps are done operator by operator: {error}"
        log.warning("step_not_captured: %s", message)
        self.warnings.append(Warned("step_not_captured", message))

    def _halve_micro_batch(self, error: RuntimeError) -> None:
        size = min(self.progress.micro_batch, self.plan.n_windows)
        try:
            half = self.plan.halved(size, self.config)
        except OutOfMemory as refusal:
            raise OutOfMemory(f"{refusal}: {error}") from error
        self.progress.micro_batch = half
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.warnings += [
            Warned(
                "micro_batch_halved",
                f"at step {self.progress.step + 1} a micro-batch of {size} windows did not fit the memory; from there "
                f"on it has {half}: a step trains on the same windows in more parts",
                half,
            ),
            Warned("resume_not_exact", "sums over smaller micro-batches are rounded otherwise"),
        ]

    def _backward(
        self, windows: list[int], n_targets: int, counts: dict[int, Tensor], dropped: dict[int, Tensor]
    ) -> None:
        """Add one micro-batch's gradient and counts, of a step of `n_targets`."""
        part = self.step.add(self.progress.step, windows, n_targets)
        for layer, counts_E in part.counts.items():
            counts[layer] = counts[layer] + counts_E
            dropped[layer] = dropped[layer] + part.dropped[layer]

    def untrained_copy(self) -> "Run | None":
        """This run before its first step, to be evaluated while this one goes on; None where percent 0 was recorded
        before the snapshot that it goes on from."""
        if self.progress.step > 0 and self._untrained is None:
            return None
        untrained = copy.copy(self)
        untrained.model = self._copied_model()
        untrained.reader = build_reader(self.path, untrained.model)
        untrained.progress = self._nothing_counted(self.progress.micro_batch)
        if self._untrained is not None:
            untrained.model.load_state_dict(self._untrained)
            self._untrained = None
        return untrained

    def _nothing_counted(self, micro_batch: int) -> _Progress:
        zero = torch.zeros((), dtype=torch.int64, device=self.device)
        return _Progress(micro_batch, dropped={layer: zero.clone() for layer in self.config.moe_layers})

    def _build_ending(self) -> Ending | None:
        rule = EndingRule.of(self.config)
        if rule is None:
            return None

        def evaluate_now(raise_if_stopped: RaiseIfStopped) -> Losses:
            loss = val_loss = 0.0
            if rule.most_loss is not None:
                loss = evaluate_loss(self.reader, self.text, raise_if_stopped)
            if rule.patience is not None:
                assert self.val_text is not None, "the config has a val_fraction"
                val_loss = evaluate_loss(self.reader, self.val_text, raise_if_stopped)
            return Losses(loss, val_loss)

        captured = None
        if isinstance(self.step, CapturedStep | Lane) and isinstance(self.reader, PlainReader):
            captured = self.step.ending(rule, self.reader, self.text, self.val_text)
        return Ending(rule, evaluate_now, captured)

    @property
    def may_end(self) -> bool:
        """Whether the evaluation after this step may end training early."""
        if self._ending is None:
            return False
        return self.progress.step % (self.config.eval_interval or self.plan.steps_per_epoch) == 0

    def launch_evaluation(self) -> bool:
        """Begin the evaluation after this step that may end training, without waiting for it; False where that is not
        done, and it is still due. Until it is read, later steps may turn out to have changed nothing."""
        assert self._ending is not None, "it may end"
        try:
            return self._ending.launch(self.progress.step, self.progress.validation)
        except CaptureFailed as error:
            message = f"steps wait for the evaluations that may end training: {error}"
            log.warning("evaluation_not_captured: %s", message)
            self.warnings.append(Warned("evaluation_not_captured", message))
            return False

    @property
    def may_have_ended(self) -> bool:
        """Whether steps are known to change nothing any more: their evaluations or figures will say why."""
        return self._ending is not None and self._ending.may_have_come

    def read_evaluations(self) -> None:
        """Wait for the evaluations that were launched. Where one of them ends training, this run is as it was after its
        step, and that evaluation is due: later steps changed nothing."""
        if self._ending is None:
            return
        progress = self.progress
        due = progress.step if progress.evaluation_is_due else None
        progress.validation, ended_after = self._ending.read(progress.validation, due)
        if ended_after is not None:
            undone = [self.order.step(index) for index in range(ended_after, progress.step)]
            progress.routed -= sum(map(self._n_routed, undone))
            progress.step, progress.evaluation_is_due = ended_after, True

    def has_reached_its_end(self, raise_if_stopped: RaiseIfStopped = go_on) -> bool:
        """Whether training ends early with the evaluation after this step, which is made now unless it was launched."""
        assert self._ending is not None, "it may end"
        progress = self.progress
        ends, progress.validation = self._ending.has_come(progress.step, progress.validation, raise_if_stopped)
        return ends

    def record(
        self,
        percent: int,
        *,
        stopped_early: bool,
        tok_per_sec: float | None,
        measured: Measured | None = None,
        raise_if_stopped: RaiseIfStopped = go_on,
    ) -> tuple[Recorded, list[Warned]]:
        """Evaluate, and gather the checkpoint's files and the warnings that its metrics give rise to.

        `measured`: what has been measured of these very weights. `raise_if_stopped` is called between two batches;
        where it raises, nothing has changed.
        """
        progress = self.progress
        if measured is None:
            measured = measure(self.model, self.text, self.val_text, self.config, self.reader, raise_if_stopped)
        evaluation = evaluation_of(
            measured,
            self.text,
            self.tokenizer,
            self.config,
            position=Position(percent=percent, step=progress.step, epoch=self.plan.epoch_of(progress.step)),
            previous_choices=progress.choices,
            train_loss=progress.train_loss,
            train_dropped={layer: int(n) / max(1, progress.routed) for layer, n in progress.dropped.items()},
            raise_if_stopped=raise_if_stopped,
        )
        metrics = evaluation.metrics
        if progress.validation.best_val_loss is not None:
            best = {name: getattr(progress.validation, name) for name in ("best_val_loss", "best_val_step")}
            metrics = metrics.model_copy(update=best)
        if stopped_early:
            metrics = metrics.model_copy(update={"stopped_early": True})
        files = self._model_files(self.model.state_dict()) | {checkpoint.METRICS: checkpoint.to_json(metrics.to_file())}
        if evaluation.choices:
            routing = {f"layer.{n}": c for n, c in evaluation.choices.items()}
            if not self.text.is_whole:
                routing["positions"] = self.text.positions()
            files[checkpoint.ROUTING] = save_tensors(routing)
        progress.choices = evaluation.choices
        self.count_anew()
        late = progress.step > self.plan.total_steps / 2
        return Recorded(metrics, tok_per_sec, files), [
            Warned(code, message) for code, message in evaluation.warnings(after_half=late)
        ]

    def copy(self) -> "Run":
        """This run as it stands, to be recorded while this one goes on, once `build_model` was called."""
        copied = copy.copy(self)
        copied.progress = replace(self.progress, dropped=_clones(self.progress.dropped))
        if isinstance(self.step, Lane):
            copied._frozen = self.step.frozen()
        else:
            copied.model = self._copied_model()
            copied.reader = build_reader(self.path, copied.model)
        return copied

    def build_model(self) -> None:
        """Build the model of a copy, where that was left to whoever records it: a program waits until all members are
        copied."""
        if self._frozen is not None:
            paths = {layer: moe.path for layer, moe in self.model.moe_layers.items()}
            self.model = GPT.build(self.config, self.model.vocab_size, "meta")
            self.model.load_state_dict(self._frozen, assign=True)
            for layer, moe in self.model.moe_layers.items():
                moe.path = paths[layer]
            self.reader = build_reader(self.path, self.model)
            self._frozen = None

    def count_anew(self) -> None:
        """Begin to count what the next checkpoint says of the steps before it."""
        self.progress.routed = 0
        for dropped in self.progress.dropped.values():  # in its place, where the program of a cohort adds to it
            dropped.zero_()

    def _copied_model(self) -> GPT:
        """A copy of the model in memory of its own: the weights may be views of what is others' too."""
        copied = GPT.build(self.config, self.model.vocab_size, self.device)
        copied.load_state_dict(self.model.state_dict())
        for layer, moe in copied.moe_layers.items():
            moe.path = self.model.moe_layers[layer].path
        return copied

    def snapshot(self, untrained: "Run | None" = None) -> Snapshot:
        """The state after the last step. `untrained`: the copy that percent 0 is still to be recorded from."""
        return self._snapshot_of(self._state(untrained))

    def frozen_snapshot(self, untrained: "Run | None" = None) -> Callable[[RaiseIfStopped], list[Snapshot]]:
        """What makes the `snapshot` of now, in any thread, however far this run has gone meanwhile."""
        state = self._state(untrained)
        copied = replace(state, tensors=_clones(state.tensors), weights=_clones(state.weights))
        return lambda _: [self._snapshot_of(copied)]

    def _state(self, untrained: "Run | None") -> "_State":
        progress = self.progress
        tensors = {f"dropped.{layer}": n for layer, n in progress.dropped.items()}
        tensors |= {f"choices.{layer}": chosen for layer, chosen in progress.choices.items()}
        tensors |= self.step.tensors()
        counted = ("micro_batch", "step", "train_loss", "routed", "evaluation_is_due")
        numbers = {name: getattr(progress, name) for name in counted} | {"validation": asdict(progress.validation)}
        before = None if untrained is None else untrained.model.state_dict()
        return _State(numbers, tensors, self.model.state_dict(), before)

    def _snapshot_of(self, state: "_State") -> Snapshot:
        files = self._model_files(state.weights) | {
            checkpoint.RESUME_TENSORS: save_tensors(_on_host(state.tensors)),
            checkpoint.RESUME_STATE: checkpoint.to_json(state.numbers),
        }
        if state.untrained is not None:
            files[checkpoint.RESUME_UNTRAINED] = save_tensors(_on_host(state.untrained))
        return Snapshot(state.numbers["step"], files)

    def _load(self, files: Mapping[str, bytes]) -> None:
        state = json.loads(files[checkpoint.RESUME_STATE])
        tensors = load_tensors(files[checkpoint.RESUME_TENSORS])
        progress = self.progress
        # An attempt that went on from here may have run out of memory since.
        state["micro_batch"] = min(state["micro_batch"], progress.micro_batch)
        state["validation"] = ValidationHistory(**state.get("validation", {}))
        for name, value in state.items():
            setattr(progress, name, value)
        for layer, dropped in progress.dropped.items():
            dropped.copy_(tensors[f"dropped.{layer}"])
        choices = {n: tensors[f"choices.{n}"] for n in self.config.moe_layers if f"choices.{n}" in tensors}
        if not self.text.is_whole:  # earlier versions read the whole of every text
            positions, n_all = self.text.positions(), self.windows.n_targets_in_all
            choices = {n: chosen[positions] if len(chosen) == n_all else chosen for n, chosen in choices.items()}
        progress.choices = choices
        self.step.load(tensors)
        if checkpoint.RESUME_UNTRAINED in files:
            self._untrained = load_tensors(files[checkpoint.RESUME_UNTRAINED])

    def _model_files(self, weights: Weights) -> dict[str, bytes]:
        return {
            checkpoint.WEIGHTS: save_tensors(_on_host(weights)),
            checkpoint.CONFIG: checkpoint.to_json(self.config.model_dump(mode="json")),
            **self.tokenizer.files(),
        }


@dataclass(frozen=True)
class _State:
    """What a snapshot holds, on the device."""

    numbers: dict[str, Any]
    tensors: Weights
    weights: Weights
    untrained: Weights | None
    """Those that percent 0 is still to be recorded from."""


def _clones(tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _on_host(tensors: Weights) -> dict[str, Tensor]:
    """The tensors in the host's memory. From a GPU all are copied at once into pinned memory, in this thread's stream,
    and waited for together: other streams go on."""
    if not any(tensor.is_cuda for tensor in tensors.values()):
        return {name: tensor.contiguous() for name, tensor in tensors.items()}
    host = {name: torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for name, t in tensors.items()}
    for name, tensor in tensors.items():
        host[name].copy_(tensor, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return host


@dataclass(frozen=True)
class Prepared:
    """A run that can begin, and what was decided for it."""

    run: Run
    execution: Execution
    """How it is computed."""
    n_tokens: int
    """Tokens of the text."""
    warnings: list[ConfigWarning]
    """What the user should know before it begins."""


def prepare(
    config: JobConfig,
    text: str,
    tokenizer: Tokenizer,
    *,
    device: str = "cpu",
    recorded_execution: Mapping[str, Any] | None = None,
    parent: Weights | None = None,
    resume: Mapping[str, bytes] | None = None,
    path: StepPath | None = None,
    n_threads: int | None = None,
    width: int | None = None,
    kept_steps: KeptSteps | None = None,
) -> Prepared:
    """Everything from a config and a text to a run on its device; this process then computes as was decided.

    `device` is `auto`, `cpu`, `cuda` or `cuda:N`. `recorded_execution`: what the job's first attempt decided, which is
    kept as far as this machine can. `parent`: weights to start from, those of another config where a dense model grows
    into a mixture. `resume`: the files of a snapshot. `path`: the way of doing a step where it covers the job, for
    whoever compares them. `n_threads`: threads of a step on a CPU, for a run that shares the cores with others; the
    first attempt's number goes before it. `width`: models of a stacked program, which the run still has to join
    (`nanomoe.training.cohort.stack`). `kept_steps`: those that earlier jobs left, and where this one leaves its
    own.

    Raises:
        DeviceUnavailable: a GPU was asked for and there is none.
        TextTooShort: fewer than 2 tokens are left to train on.
    """
    tokens = tokenizer.encode(text)
    is_first = recorded_execution is None
    execution = Execution.decide(
        config,
        device,
        n_tokens=len(tokens),
        vocab_size=tokenizer.vocab_size if is_first else None,
        path=path,
        n_threads=n_threads,
        width=width,
    )
    differences: list[str] = []
    if recorded_execution is not None:
        first = Execution.recorded(recorded_execution, config)
        execution = execution.keeping(first)
        differences = first.differences(execution)
    execution.apply()
    run = Run(
        config,
        tokens,
        tokenizer,
        execution,
        device=find_device(device),
        parent=None if parent is None else starting_weights(parent, config, seed=config.seed),
        resume=resume,
        kept_steps=kept_steps,
    )
    warnings = config_warnings(config, run.plan, n_bytes=len(text.encode()), vocab_size=tokenizer.vocab_size)
    if execution.recomputes_activations:
        message = (
            "the memory holds the activations of no micro-batch: each block is computed again in the backward pass"
        )
        log.warning("activations_recomputed: %s", message)
        warnings.append(ConfigWarning(code="activations_recomputed", message=message))
    if is_first and execution.micro_batch < config.batch_size:
        message = (
            f"a micro-batch of {config.batch_size} windows would not fit the memory; it has {execution.micro_batch}: a "
            "step trains on the same windows in more parts"
        )
        log.warning("micro_batch_reduced: %s", message)
        warnings.append(ConfigWarning(code="micro_batch_reduced", message=message))
    if differences:
        message = f"this attempt computes otherwise than the first one did: {'; '.join(differences)}"
        warnings.append(ConfigWarning(code="resume_not_exact", message=message))
    return Prepared(run, execution, len(tokens), warnings)
