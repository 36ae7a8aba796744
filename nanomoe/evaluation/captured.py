"""The loss of a text as replays of captured graphs: the host launches an evaluation and waits for nothing.

There is a graph for each number of windows that a batch has: as many as are read together, and what is left for the
last. It reads which windows are its own at a cursor on the device, and moves that on. What it does are the operators of
`nanomoe.evaluation.reader.PlainReader`, in its order, so a text's loss is the same number, bit for bit.
"""

import torch

from nanomoe.cuda_graphs import Graphs, Program
from nanomoe.evaluation.evaluated_text import EvaluatedText
from nanomoe.evaluation.reader import PlainReader


class CapturedLoss:
    """The loss of what evaluations read of a text, at the model's weights of the time."""

    def __init__(self, reader: PlainReader, text: EvaluatedText, graphs: Graphs) -> None:
        """`graphs`: of work that never runs at the same time as an evaluation."""
        self._reader = reader
        self._windows = text.all_windows
        self._graphs = graphs
        device = self._windows.device
        per_batch = reader.windows_per_batch(self._windows)
        self._sizes = [len(batch) for batch in text.batches(per_batch)]
        self._chosen = torch.tensor(text.windows, device=device)
        self._cursor = torch.zeros(1, dtype=torch.int64, device=device)
        """The first window of the next batch, of those that are read."""
        self._offsets = torch.arange(max(self._sizes), device=device)
        self._n_targets = torch.tensor(float(text.n_targets), dtype=torch.float64, device=device)
        """On the device, because dividing by a number of the host multiplies by its reciprocal there."""
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        """Sum of the losses of the batches so far."""
        self._programs: dict[int, Program] = {}
        """By the number of their windows."""

    def launch(self) -> None:
        """Begin to add up the losses of all batches.

        Raises:
            RuntimeError: memory ran out, or an operator cannot be captured.
        """
        for size in self._sizes:
            if size not in self._programs:
                self._programs[size] = self._graphs.capture(lambda size=size: self._add(size), self.state)  # type: ignore[misc]
            self._programs[size].replay()

    @property
    def state(self) -> list[torch.Tensor]:
        """What `launch` and `take` change."""
        return [self.total, self._cursor]

    def take(self) -> torch.Tensor:
        """The mean loss, nats per token, float64, 0-dim, once all batches were added; the first batch is next, and the
        sum 0. To be captured."""
        mean = self.total / self._n_targets
        for tensor in self.state:
            tensor.zero_()
        return mean

    def _add(self, size: int) -> None:
        # Only what warms up for a capture goes beyond the last window.
        windows_B = self._chosen.index_select(0, (self._cursor + self._offsets[:size]).remainder(len(self._chosen)))
        self._cursor.add_(size)
        self.total.add_(self._reader.sum_of_losses(*self._windows.gather(windows_B)))
