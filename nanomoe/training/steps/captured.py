"""An optimizer step on a GPU as captured CUDA graphs: plain operators or ones with kernels of our own, all at once.

A step is a replay of one graph for each micro-batch, which adds to the gradient, and of one that clips it and changes
the weights. Whatever differs from step to step lies on the device and is overwritten before a replay: which windows are
trained on, the keys of their dropout, the number of targets, the learning rate (`Agenda`). The step's number, and with
it the bias correction of AdamW's averages, is counted by the graph itself. There is a graph for each number of windows
that a micro-batch has, one if it is the first of its step and one if not; all are captured when they are first needed.

Nothing is read back: losses and norms go to a ring on the device until somebody looks. Since that may be many steps
later, a step whose loss or gradient is not finite changes nothing, and no step after it does, nor does one after an
evaluation that ends training (`CapturedEnding`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from nanomoe.config import JobConfig
from nanomoe.cuda_graphs import Graphs, Program
from nanomoe.data import Windows
from nanomoe.evaluation.evaluated_text import EvaluatedText
from nanomoe.evaluation.reader import PlainReader
from nanomoe.model.gpt import GPT
from nanomoe.model.moe import MoE
from nanomoe.training.early_stopping import EndingRule
from nanomoe.training.memory import is_out_of_memory
from nanomoe.training.steps.agenda import Agenda, empty_rows
from nanomoe.training.steps.ending import CapturedEnding
from nanomoe.training.steps.operators import Operators
from nanomoe.training.steps.step import MOST_UNREAD, CaptureFailed, Figures, Part, Planned, TrainingStep

T = TypeVar("T")


class CapturedStep(TrainingStep):
    """The step as replays of captured graphs."""

    def __init__(self, model: GPT, windows: Windows, config: JobConfig, operators: Operators, graphs: Graphs) -> None:
        """`operators`: what the graphs are of. The gradients of the model's parameters become buffers that stay."""
        self._operators = operators
        self._windows = windows
        self._config = config
        self._graphs = graphs
        self._device = windows.device
        self._parameters = list(model.parameters())
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._gradients = [p.grad for p in self._parameters if p.grad is not None]
        torch._foreach_add_(self._gradients, self._gradients)  # the one kernel that no first micro-batch has run
        self._moe_layers = model.moe_layers
        self._part, self._sum = self._empty_part(), self._empty_part()
        """Overwritten by each micro-batch, and summed up over those of a step."""
        self._grad_norm, self._lr, self.is_skipped = (torch.zeros((), device=self._device) for _ in range(3))
        """`is_skipped`: where it is 1 and not 0, steps change nothing."""
        rows = empty_rows(min(config.batch_size, windows.count), self._device)
        self._agenda = Agenda(windows, config.seed, rows)
        self._figures = torch.zeros(2 * MOST_UNREAD, 2, device=self._device)
        """A ring: loss and norm of a step each."""
        self._next_figures = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._n_updates = 0
        self._micro_batches: dict[tuple[int, bool], Program] = {}
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
        self._agenda.prepare(index, windows, n_targets, self.lr)
        key = len(windows), self._is_first
        if key not in self._micro_batches:
            self._micro_batches[key] = self._captured(lambda: self._capture_gradient(*key))
        self._micro_batches[key].replay()
        self._is_first = False
        return self._part

    def update(self) -> Figures:
        assert self._update is not None, "a step begins with begin()"
        self._update.replay()
        self._graphs.limit_lead()
        figures = self._figures[self._n_updates % len(self._figures)]
        self._n_updates += 1
        return Figures(figures[0], figures[1])

    def restart(self, seed: int) -> None:
        """Begin another job with this seed, whose weights and text are in the places of the last one's."""
        self.load({name: torch.zeros_like(tensor) for name, tensor in self.tensors().items()})
        self.is_skipped.zero_()
        self._agenda.restart(seed)

    def ending(
        self, rule: EndingRule, reader: PlainReader, text: EvaluatedText, val_text: EvaluatedText | None
    ) -> CapturedEnding:
        """What decides on the device whether training ends early, and then turns later steps into ones that change
        nothing."""
        return CapturedEnding(rule, reader, text, val_text, self._graphs, self.is_skipped)

    def look_ahead(self, plan: Callable[[int], Planned | None]) -> None:
        self._agenda.plan = plan

    def balance(self, moe_layers: Mapping[int, MoE], counts: Mapping[int, Tensor]) -> None:
        """Do nothing: the graph of `update` has done it."""

    def tensors(self) -> dict[str, Tensor]:
        return self._operators.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._operators.load(tensors)

    def _captured(self, capture: Callable[[], T]) -> T:
        try:
            return capture()
        except RuntimeError as error:
            # Whatever was captured gives its memory back: the step begins anew, with smaller micro-batches or without.
            self._micro_batches.clear()
            self._update = None
            self._agenda.forget()
            if is_out_of_memory(error):
                raise
            # The end of a capture that failed may raise an error of its own.
            if error.__context__ is not None and is_out_of_memory(error.__context__):
                raise error.__context__ from None
            raise CaptureFailed(f"the step could not be captured as a CUDA graph: {error}") from error

    def _capture_gradient(self, n_windows: int, is_first: bool) -> Program:
        def work() -> None:
            row = self._agenda.read(n_windows)
            self._lr.copy_(row.lr)
            objective, part = self._operators.objective(row.windows_B, row.keys_B, row.n_targets.float(), row.share)
            gradients = torch.autograd.grad(objective, self._parameters)
            with torch.no_grad():
                if part.dropped:
                    is_done = (1 - self.is_skipped).long()
                    part = part._replace(dropped={layer: n * is_done for layer, n in part.dropped.items()})
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

        is_warm = any(size == n_windows for size, _ in self._micro_batches)
        changed = [*self._gradients, *_tensors(self._sum), self._agenda.cursor]
        return self._graphs.capture(work, changed, is_warm=is_warm)

    def _capture_update(self) -> Program:
        def work() -> None:
            self._operators.update(self._sum.loss, self._lr, self._grad_norm, self.is_skipped)
            self._figures.index_copy_(0, self._next_figures, torch.stack([self._sum.loss, self._grad_norm])[None])
            self._next_figures.add_(1).remainder_(len(self._figures))
            for layer, moe in self._moe_layers.items():  # where no expert was chosen at all, no bias moves
                moe.update_balance_bias(self._sum.counts[layer] * (1 - self.is_skipped).long())

        was_skipped = self.is_skipped.clone()
        self.is_skipped.fill_(1.0)  # warm-ups change no weight
        try:
            return self._graphs.capture(work, [*self._gradients, self._next_figures])
        finally:
            self.is_skipped.copy_(was_skipped)

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
