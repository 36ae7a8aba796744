"""What the host sends to a captured step, and how seldom."""

import pytest
import torch

from nanomoe.data import Windows
from nanomoe.model.dropout import window_keys
from nanomoe.training.steps import agenda, captured, choice
from nanomoe.training.steps.agenda import Agenda, empty_rows
from nanomoe.training.steps.step import Planned
from tests.nanomoe.training.steps.graphs_stand_in import RecordedGraphs
from tests.nanomoe.training.steps.runs import start

WINDOWS = Windows(torch.arange(30), 8)  # four, the last with five targets
SEED = 3


class Sends:
    """Counts what is sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n = 0
        send = Agenda._send

        def counted(*given: object) -> None:
            self.n += 1
            send(*given)  # type: ignore[arg-type]

        monkeypatch.setattr(Agenda, "_send", counted)


def planned(index: int) -> Planned | None:
    return Planned([[0, 3], [1, 2]], 0.5 / (index + 1)) if index < 6 else None


def check_row(of: Agenda, step: int, windows: list[int], lr: float) -> None:
    of.prepare(step, windows, 29, lr)
    row = of.read(len(windows))
    assert (int(row.n_targets), row.windows_B.tolist()) == (29, windows)
    assert row.keys_B.tolist() == window_keys(step, windows, SEED)
    torch.testing.assert_close(row.share, torch.tensor(WINDOWS.n_targets(windows) / 29))
    torch.testing.assert_close(row.lr, torch.tensor(lr))


def test_rows_of_many_steps_are_sent_at_once_and_again_where_it_came_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenda, "_ROWS", 8)
    sends, of = Sends(monkeypatch), Agenda(WINDOWS, SEED, empty_rows(2, WINDOWS.device))
    of.plan = planned
    for step in range(4):
        check_row(of, step, [0, 3], 0.5 / (step + 1))
        check_row(of, step, [1, 2], 0.5 / (step + 1))
    assert sends.n == 1
    check_row(of, 4, [0, 3], 0.1)
    assert sends.n == 2, "the rows were used up"
    for window in (1, 2):  # a micro-batch was halved
        check_row(of, 4, [window], 0.1)
    assert sends.n == 4
    check_row(of, 5, [0, 3], 0.5 / 6)
    check_row(of, 5, [1, 2], 7.0)
    assert sends.n == 6, "the rate was another"


def test_a_step_gets_nothing_from_the_host_but_its_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(choice.CAPTURING, "cpu", RecordedGraphs)
    sends = Sends(monkeypatch)
    config = {"n_layer": 1, "n_embd": 16, "batch_size": 3, "gradient_accumulation_steps": 2, "warmup_steps": 5}
    run = start(config, "captured")
    for _ in range(9):
        run.train_step()
    assert sends.n == 1


def test_figures_outlive_the_steps_after_them_until_the_ring_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(choice.CAPTURING, "cpu", RecordedGraphs)
    monkeypatch.setattr(captured, "MOST_UNREAD", 2)
    config = {"n_layer": 1, "n_embd": 16, "lr": 1e-3}
    ours, theirs = start(config, "captured"), start(config, "eager")
    for _ in range(3):
        mine, reference = ([torch.stack(run.train_step()) for _ in range(3)] for run in (ours, theirs))
        torch.testing.assert_close(mine, reference)
