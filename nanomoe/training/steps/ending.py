"""Whether training ends early, decided on the device: the evaluations that decide it as captured graphs, and what then
turns later steps into ones that change nothing.

The host launches such an evaluation after its step and goes on with the steps after it. It decides the same once it has
read the losses, by the same comparisons of the same float64 numbers (`nanomoe.training.early_stopping`).
"""

import torch
from torch import Tensor

from nanomoe.cuda_graphs import Graphs, Program
from nanomoe.evaluation.captured import CapturedLoss
from nanomoe.evaluation.evaluated_text import EvaluatedText
from nanomoe.evaluation.reader import PlainReader
from nanomoe.training.early_stopping import EndingRule, ValidationHistory
from nanomoe.training.steps.step import CaptureFailed


class CapturedEnding:
    """The rule on the device, and the evaluations that it looks at as captured graphs."""

    def __init__(
        self,
        rule: EndingRule,
        reader: PlainReader,
        text: EvaluatedText,
        val_text: EvaluatedText | None,
        graphs: Graphs,
        is_skipped: Tensor,
    ) -> None:
        """`is_skipped`, float32, 0-dim: is set to 1 where training ends; where it is 1, steps change nothing. `graphs`:
        those of the steps."""
        device = is_skipped.device
        self._rule = rule
        self._graphs = graphs
        self._is_skipped = is_skipped
        self._loss = None if rule.most_loss is None else CapturedLoss(reader, text, graphs)
        self._val_loss = None
        if rule.patience is not None:
            assert val_text is not None, "the config has a val_fraction"
            self._val_loss = CapturedLoss(reader, val_text, graphs)
        self._best = torch.zeros((), dtype=torch.float64, device=device)
        self._without_improvement = torch.zeros((), dtype=torch.int64, device=device)
        """Evaluations since the best one, as in `ValidationHistory`; -1 before the first evaluation."""
        self._found = torch.zeros(3, dtype=torch.float64, device=device)
        """The losses of both texts, and whether training ends with them; overwritten by each evaluation."""
        self._decide: Program | None = None
        self._sign = torch.zeros((), pin_memory=device.type == "cuda")

    @property
    def may_have_ended(self) -> bool:
        """Whether training is known to have ended, by an evaluation or by a loss that is not finite. Waits for nothing:
        what the device has not done yet is not known."""
        return bool(self._sign.numpy() != 0)

    def follow(self, history: ValidationHistory) -> None:
        """Go on from what the host knows, with nothing launched that it has not read."""
        self._best.fill_(0.0 if history.best_val_loss is None else history.best_val_loss)
        self._without_improvement.fill_(-1 if history.best_val_loss is None else history.without_improvement)

    def launch(self) -> Tensor:
        """Begin an evaluation at the weights of the steps launched before. What it will find, (3,) float64: the losses
        of both texts, 0 where there is none, and whether training ends with them.

        Raises:
            CaptureFailed: memory ran out, or an operator cannot be captured; nothing was decided.
        """
        losses = [loss for loss in (self._loss, self._val_loss) if loss is not None]
        try:
            for loss in losses:
                loss.launch()
            if self._decide is None:
                changed = [tensor for loss in losses for tensor in loss.state]
                changed += [self._best, self._without_improvement, self._is_skipped]
                self._decide = self._graphs.capture(self._judge, changed)
        except RuntimeError as error:
            raise CaptureFailed(f"the evaluation could not be captured as CUDA graphs: {error}") from error
        self._decide.replay()
        self._sign.copy_(self._is_skipped, non_blocking=True)
        return self._found.clone()

    def _judge(self) -> None:
        """`EndingRule.judge`, to be captured."""
        rule, loss, val_loss = self._rule, self._found.new_zeros(()), self._found.new_zeros(())
        ends = torch.zeros_like(self._is_skipped, dtype=torch.bool)
        if self._loss is not None and rule.most_loss is not None:
            loss = self._loss.take()
            ends |= loss <= rule.most_loss
        if self._val_loss is not None and rule.patience is not None:
            val_loss = self._val_loss.take()
            is_better = (self._without_improvement < 0) | (val_loss < self._best - rule.min_delta)
            self._best.copy_(torch.where(is_better, val_loss, self._best))
            self._without_improvement.add_(1).masked_fill_(is_better, 0)
            ends |= self._without_improvement >= rule.patience
        self._found.copy_(torch.stack([loss, val_loss, ends.double()]))
        self._is_skipped.copy_(torch.maximum(self._is_skipped, ends.float()))
