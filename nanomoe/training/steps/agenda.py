"""What the next micro-batches of a captured step need from the host, sent to the device for many steps at a time.

A row is what one micro-batch needs. The graph of a micro-batch reads the row at a cursor and moves it on, so that a
step needs nothing from the host but its replays. Where what is done differs from what was foreseen, new rows are sent.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanomoe.data import Windows
from nanomoe.model.dropout import window_keys
from nanomoe.training.steps.step import Planned

_ROWS = 256
"""Micro-batches that are sent at once: copying so many numbers costs what copying few does. Assumed."""

_SPARE = 8
"""Rows after them, which only the runs that warm up for a capture read."""

_FIXED = 4
"""Numbers of a row beside those of its windows."""


class MicroBatchRow(NamedTuple):
    """A row as the graph of a micro-batch has it: tensors on the device, 0-dim, or one number a window (B,); of several
    agendas, with a dimension in front."""

    n_targets: Tensor
    """Targets of the whole step, int64."""
    share: Tensor
    """Those of the micro-batch over those of the whole step, float32."""
    lr: Tensor
    """Learning rate of the step, float32."""
    windows_B: Tensor
    """Numbers of the windows, int64."""
    keys_B: Tensor
    """Their `window_keys`, int64."""
    n_windows: Tensor
    """How many they are, int64: what is in the places after them, no micro-batch has."""


class _Foreseen(NamedTuple):
    step: int
    windows: tuple[int, ...]
    n_targets: int
    lr: float


def empty_rows(most_windows: int, device: torch.device) -> Tensor:
    """The memory of an agenda, (rows, numbers), int64: rows of no window, which may be read all the same.
    `most_windows`: the most that a micro-batch has."""
    rows = torch.zeros(_ROWS + _SPARE, _FIXED + 2 * most_windows, dtype=torch.int64, device=device)
    rows[:, 0] = 1  # targets of the step, by which its losses are divided
    return rows


def read_rows(rows: Tensor) -> MicroBatchRow:
    """The parts of rows (..., numbers), on the device; to be captured."""
    share = (rows[..., 1].double() / rows[..., 0].double()).float()
    windows, keys = rows[..., _FIXED:].chunk(2, -1)
    lr = rows[..., 2].to(torch.int32).view(torch.float32)
    return MicroBatchRow(rows[..., 0], share, lr, windows, keys, rows[..., 3])


class Agenda:
    """The rows on the device, and what of them has been used."""

    def __init__(
        self, windows: Windows, seed: int, rows: Tensor, cursor: Tensor | None = None, *, rows_a_step: int = 0
    ) -> None:
        """`rows`: `empty_rows`. `cursor` (1,), int64, on the device: the next row to be read, advanced by whoever reads
        it. `rows_a_step`: how many each step has at least; those after its micro-batches have no window."""
        self._windows = windows
        self._seed = seed
        self._rows = rows
        self._rows_a_step = rows_a_step
        self.cursor = torch.zeros(1, dtype=torch.int64, device=windows.device) if cursor is None else cursor
        self._to_come: list[_Foreseen] = []
        self.plan: Callable[[int], Planned | None] = lambda index: None
        """The steps to come, as far as they are known."""

    def read(self, n_windows: int) -> MicroBatchRow:
        """The next row, on the device; to be captured."""
        row = read_rows(self._rows.index_select(0, self.cursor)[0])
        self.cursor.add_(1)
        return row._replace(windows_B=row.windows_B[:n_windows], keys_B=row.keys_B[:n_windows])

    def prepare(self, index: int, windows: Sequence[int], n_targets: int, lr: float) -> None:
        """See to it that the next row is this micro-batch of step `index`."""
        wanted = _Foreseen(index, tuple(windows), n_targets, lr)
        self._take([wanted], lambda: self._after(wanted))

    def prepare_step(self, index: int, planned: Planned, n_targets: int) -> None:
        """See to it that the next rows are those of step `index`, which has `n_targets` targets."""
        self._take(self._of_step(index, planned, n_targets), lambda: self._from(index + 1))

    def _take(self, wanted: list[_Foreseen], after: Callable[[], list[_Foreseen]]) -> None:
        n = len(wanted)
        if self._to_come[: -n - 1 : -1] != wanted:
            foreseen = [*wanted, *after()][:_ROWS]
            self._send(foreseen)
            self._to_come = foreseen[::-1]
        del self._to_come[-n:]

    def restart(self, seed: int) -> None:
        """Begin another job with this seed, of whose steps nothing is known yet."""
        self._seed = seed
        self.plan = lambda index: None
        self.forget()

    def forget(self) -> None:
        """Send new rows before the next micro-batch, whatever was foreseen."""
        self._to_come = []

    def _after(self, first: _Foreseen) -> list[_Foreseen]:
        """What is foreseen after a micro-batch: the rest of its step, and the steps after it."""
        rows = self._from(first.step)
        return rows[rows.index(first) + 1 :] if first in rows else []

    def _from(self, index: int) -> list[_Foreseen]:
        """What is foreseen of this step and those after it."""
        rows: list[_Foreseen] = []
        while len(rows) < 2 * _ROWS and (planned := self.plan(index)) is not None:
            n_targets = self._windows.n_targets([w for windows in planned.micro_batches for w in windows])
            rows += self._of_step(index, planned, n_targets)
            index += 1
        return rows

    def _of_step(self, index: int, planned: Planned, n_targets: int) -> list[_Foreseen]:
        none: list[list[int]] = [[]] * (self._rows_a_step - len(planned.micro_batches))
        return [_Foreseen(index, tuple(windows), n_targets, planned.lr) for windows in planned.micro_batches + none]

    def _send(self, foreseen: Sequence[_Foreseen]) -> None:
        """One copy, without waiting for the device: pinned memory is not used again before it was read."""
        rows = torch.zeros(len(foreseen), self._rows.shape[1], dtype=torch.int64)
        keys_at = _FIXED + (rows.shape[1] - _FIXED) // 2
        for row, one in zip(rows.numpy(), foreseen, strict=True):
            rate = int(np.float32(one.lr).view(np.int32))
            n = len(one.windows)
            row[:_FIXED] = [one.n_targets, self._windows.n_targets(list(one.windows)), rate, n]
            row[_FIXED : _FIXED + n] = one.windows
            row[keys_at : keys_at + n] = window_keys(one.step, one.windows, self._seed)
        pinned = rows.pin_memory() if self._rows.device.type == "cuda" else rows
        self._rows[: len(rows)].copy_(pinned, non_blocking=True)
        self.cursor.zero_()
