"""An optimizer step on a GPU as captured CUDA graphs: the operators of `nanomoe.training.steps.eager`, all at once.

A step is a replay of one graph for each micro-batch, which adds to the gradient, and of one that clips it and changes
the weights. Whatever differs from step to step lies on the device and is overwritten before a replay: which windows are
trained on, the keys of their dropout, the number of targets, the learning rate. The step's number, and with it the bias
correction of AdamW's averages, is counted by the graph itself. There is a graph for each number of windows that a
micro-batch has, one if it is the first of its step and one if not; all are captured when they are first needed.

Nothing is read back: losses and norms stay on the device until somebody looks. Since that may be many steps later, a
step whose loss or gradient is not finite changes nothing, and no step after it does.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from nanomoe.config import JobConfig
from nanomoe.cuda_graphs import Graphs, Program
from nanomoe.data import Windows
from nanomoe.model.dropout import Dropout, new_counters, window_keys
from nanomoe.model.gpt import GPT
from nanomoe.model.moe import MoE
from nanomoe.training.memory import is_out_of_memory
from nanomoe.training.steps.eager import EagerStep
from nanomoe.training.steps.step import CaptureFailed, Part, TrainingStep

T = TypeVar("T")


@dataclass(frozen=True)
class _GradientOfMicroBatch:
    program: Program
    given: Tensor
    """int64: targets of the step, targets of the micro-batch, its windows (B), their keys (B)."""


class CapturedStep(TrainingStep):
    """The step as replays of captured graphs."""

    def __init__(
        self, model: GPT, windows: Windows, config: JobConfig, activations: torch.dtype, graphs: Graphs
    ) -> None:
        """`activations`: type of activations and matrix products. The gradients of the model's parameters become
        buffers that this step holds."""
        self._operators = EagerStep(model, windows, config, activations)
        self._windows = windows
        self._config = config
        self._activations = activations
        self._graphs = graphs
        self._counters = functools.cache(new_counters)  # for as long as the graphs that read them
        self._device = windows.device
        self._parameters = list(model.parameters())
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
        self._gradients = [p.grad for p in self._parameters if p.grad is not None]
        torch._foreach_add_(self._gradients, self._gradients)  # the one kernel that no first micro-batch has run
        self._moe_layers = model.moe_layers
        self._part, self._sum = self._empty_part(), self._empty_part()
        """Overwritten by each micro-batch, and summed up over those of a step."""
        self._grad_norm, self._lr, self._is_skipped = (torch.zeros((), device=self._device) for _ in range(3))
        self._micro_batches: dict[tuple[int, bool], _GradientOfMicroBatch] = {}
        """By the number of their windows, and whether they are the first of their step."""
        self._update: Program | None = None
        self._is_first = True
        self.lr = config.lr

    def begin(self) -> None:
        self._is_first = True
        if self._update is None:
            self._update = self._captured(self._capture_update)

    def add(self, index: int, windows: Sequence[int], n_targets: int) -> Part:
        """See `TrainingStep`; what is returned is overwritten by the next call."""
        of_windows = [*windows, *window_keys(index, windows, self._config.seed)]
        given = [n_targets, self._windows.n_targets(list(windows)), *of_windows]
        key = len(windows), self._is_first
        if key not in self._micro_batches:
            there = torch.tensor(given, device=self._device)
            self._micro_batches[key] = self._captured(lambda: self._capture_gradient(there, is_first=key[1]))
        micro_batch = self._micro_batches[key]
        self._send(torch.tensor(given), micro_batch.given)
        micro_batch.program.replay()
        self._is_first = False
        return self._part

    def update(self) -> Tensor:
        assert self._update is not None, "a step begins with begin()"
        self._send(torch.tensor(self.lr), self._lr)
        self._update.replay()
        self._graphs.limit_lead()
        return self._grad_norm.clone()

    def balance(self, moe_layers: Mapping[int, MoE], counts: Mapping[int, Tensor]) -> None:
        """Do nothing: the graph of `update` has done it."""

    def tensors(self) -> dict[str, Tensor]:
        return self._operators.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._operators.load(tensors)

    def _send(self, numbers: Tensor, to: Tensor) -> None:
        """Copy numbers to the device without waiting for it: pinned memory is not used again before it was read."""
        to.copy_(numbers.pin_memory() if self._device.type == "cuda" else numbers, non_blocking=True)

    def _captured(self, capture: Callable[[], T]) -> T:
        try:
            return capture()
        except RuntimeError as error:
            # Whatever was captured gives its memory back: the step begins anew, with smaller micro-batches or without.
            self._micro_batches.clear()
            self._update = None
            if is_out_of_memory(error):
                raise
            # The end of a capture that failed may raise an error of its own.
            if error.__context__ is not None and is_out_of_memory(error.__context__):
                raise error.__context__ from None
            raise CaptureFailed(f"the step could not be captured as a CUDA graph: {error}") from error

    def _capture_gradient(self, given: Tensor, *, is_first: bool) -> _GradientOfMicroBatch:
        def work() -> None:
            n_targets, n_own = given[:2]
            windows_B, keys_B = given[2:].chunk(2)
            dropout = Dropout.of_window_keys(self._config, keys_B, dtype=self._activations, counters=self._counters)
            share = (n_own.double() / n_targets.double()).float()
            objective, part = self._operators.objective(
                *self._windows.gather(windows_B), dropout, n_targets.float(), share
            )
            gradients = torch.autograd.grad(objective, self._parameters)
            with torch.no_grad():
                own, there, sums = _tensors(part), _tensors(self._part), _tensors(self._sum)
                for one, to in zip(own, there, strict=True):
                    to.copy_(one)
                if is_first:
                    torch._foreach_copy_(self._gradients, gradients)
                    for one, to in zip(own, sums, strict=True):
                        to.copy_(one)
                else:
                    torch._foreach_add_(self._gradients, gradients)
                    for one, to in zip(own, sums, strict=True):
                        to.add_(one)

        n_windows = len(given) // 2 - 1
        is_warm = any(size == n_windows for size, _ in self._micro_batches)
        changed = [*self._gradients, *_tensors(self._sum)]
        return _GradientOfMicroBatch(self._graphs.capture(work, changed, is_warm=is_warm), given)

    def _capture_update(self) -> Program:
        def work() -> None:
            grad_norm = self._operators.gradient_norm()
            is_finite = torch.stack([self._sum.loss, grad_norm]).isfinite().all()
            self._is_skipped.copy_(torch.maximum(self._is_skipped, (~is_finite).float()))
            self._operators.apply_gradients(grad_norm, self._lr, self._is_skipped)
            self._grad_norm.copy_(grad_norm)
            for layer, moe in self._moe_layers.items():  # where no expert was chosen at all, no bias moves
                moe.update_balance_bias(self._sum.counts[layer] * (1 - self._is_skipped).long())

        was_skipped = self._is_skipped.clone()
        self._is_skipped.fill_(1.0)  # warm-ups change no weight
        try:
            return self._graphs.capture(work, self._gradients)
        finally:
            self._is_skipped.copy_(was_skipped)

    def _empty_part(self) -> Part:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=self._device)

        return Part(
            torch.zeros((), device=self._device),
            {layer: zeros(self._config.n_experts) for layer in self._moe_layers},
            {layer: zeros() for layer in self._moe_layers},
        )


def _tensors(part: Part) -> list[Tensor]:
    return [part.loss, *part.counts.values(), *part.dropped.values()]
