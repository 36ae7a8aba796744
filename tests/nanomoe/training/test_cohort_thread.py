"""The thread beside the steps of a cohort: which checkpoints it evaluates together, and what the fault of one is to the
others."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import closing
from typing import Any

import pytest
import torch

from nanomoe.config import JobConfig
from nanomoe.evaluation.evaluate import Measured
from nanomoe.evaluation.evaluated_text import RaiseIfStopped, go_on
from nanomoe.evaluation.together import Evaluated, measure_together
from nanomoe.tokenizer import load_tokenizer
from nanomoe.training import cohort_thread
from nanomoe.training.beside import Launched, Made, Recording
from nanomoe.training.cohort import stack
from nanomoe.training.cohort_thread import CohortThread
from nanomoe.training.run import Recorded, Run, Warned, prepare
from nanomoe.training.steps import choice
from tests.nanomoe.training.steps.graphs_stand_in import RecordedGraphs

TEXT = "o rato roeu a roupa do rei de roma. "
TINY = {
    "tokenizer": "bytes", "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 8, "cont_max_new_tokens": 4,
}  # fmt: skip
WIDTH = 4
MOST_SECONDS = 60.0


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    """Runs of one program: three evaluate texts of one length, the last a longer one."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(choice.CAPTURING, "cpu", RecordedGraphs)
        texts = [TEXT, TEXT[::-1], TEXT, TEXT + TEXT]
        made = [
            prepare(
                JobConfig.model_validate(TINY | {"seed": seed}), text, load_tokenizer("bytes"), path="stacked",
                n_threads=1,
            ).run
            for seed, text in enumerate(texts)
        ]  # fmt: skip
        stack(made, WIDTH)
    return made


def make_all(
    made: Sequence[Callable[[RaiseIfStopped], Sequence[Made]]], abandoned: Sequence[int] = ()
) -> list[Future[Sequence[Made]]]:
    """Have the thread make these things as one batch, some of which nobody collects."""

    def cancelled() -> None:
        raise CancelledError

    with closing(CohortThread()) as thread:
        futures = [
            thread.begin(make, cancelled if n in abandoned else go_on, Launched(torch.device("cpu")))
            for n, make in enumerate(made)
        ]
        thread.start()
    return futures


def recordings(runs: Sequence[Run]) -> list[Recording]:
    copies = [run.copy() for run in runs]
    for each in copies:
        each.build_model()
    return [Recording(each, 25, stopped_early=False, tok_per_sec=None) for each in copies]


def files(made: Future[Sequence[Made]]) -> dict[str, bytes]:
    recorded, *warnings = made.result(MOST_SECONDS)
    assert isinstance(recorded, Recorded)
    assert warnings == []
    return recorded.files


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many models each evaluation had."""
    found: list[int] = []

    def counting(members: Sequence[Evaluated], width: int, raise_if_stopped: RaiseIfStopped) -> list[Measured]:
        assert width == WIDTH
        found.append(len(members))
        return measure_together(members, width, raise_if_stopped)

    monkeypatch.setattr(cohort_thread, "measure_together", counting)
    return found


def test_what_was_begun_before_a_start_is_evaluated_together_with_the_same_bytes(
    runs: list[Run], passes: list[int]
) -> None:
    together = list(map(files, make_all(recordings(runs))))
    assert passes == [3, 1]  # by the lengths of their texts
    alone = [files(make_all([one])[0]) for one in recordings(runs)]
    assert passes[2:] == [1, 1, 1, 1]
    assert together == alone


def test_groups_are_told_once_and_what_is_no_checkpoint_is_made_too(
    runs: list[Run], passes: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with closing(CohortThread()) as thread, caplog.at_level(logging.WARNING):
        for _ in range(2):
            made = [thread.begin(each, go_on, Launched(torch.device("cpu"))) for each in recordings(runs[2:])]
            other = thread.begin(lambda _: [Warned("code", "message")], go_on, Launched(torch.device("cpu")))
            thread.start()
            assert all(files(each) for each in made)
            assert other.result(MOST_SECONDS) == [Warned("code", "message")]
    assert passes == [1, 1] * 2
    assert caplog.text.count("evaluated_in_groups") == 1


def test_one_whose_evaluation_fails_fails_alone(runs: list[Run], passes: list[int]) -> None:
    expected = [files(make_all([one])[0]) for one in recordings(runs[:3])]
    made = recordings(runs[:3])
    weight = made[1].run.model.transformer.ln_f.weight
    weight.data = torch.full_like(weight, float("inf"))  # not in place: all who copy before the next step share theirs
    first, poisoned, last = make_all(made)
    with pytest.raises(ValueError, match="overflow"):
        poisoned.result(MOST_SECONDS)
    assert [files(first), files(last)] == [expected[0], expected[2]]
    assert passes[3:] == [3, 1, 1, 1]


def test_where_memory_runs_out_each_is_evaluated_by_itself_and_says_so(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> list[Measured]:
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")

    expected = [one.run.record(25, stopped_early=False, tok_per_sec=None)[0] for one in recordings(runs[:2])]
    monkeypatch.setattr(cohort_thread, "measure_together", full)
    for made, alone in zip(make_all(recordings(runs[:2])), expected, strict=True):
        recorded, warned = made.result(MOST_SECONDS)
        assert isinstance(recorded, Recorded)
        assert recorded.files == alone.files
        assert isinstance(warned, Warned)
        assert warned.code == "evaluated_alone"


def test_what_nobody_collects_any_more_is_not_made_and_the_others_are(runs: list[Run], passes: list[int]) -> None:
    kept, dropped = make_all(recordings(runs[:2]), abandoned=[1])
    assert files(kept)
    with pytest.raises(CancelledError):
        dropped.result(MOST_SECONDS)
    assert passes == [2]
    for each in make_all(recordings(runs[:2]), abandoned=[0, 1]):
        with pytest.raises(CancelledError):
            each.result(MOST_SECONDS)


def test_a_fault_of_the_thread_itself_reaches_whoever_waits(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> int:
        raise AssertionError("a bug")

    monkeypatch.setattr(cohort_thread, "models_at_once", broken)
    for each in make_all(recordings(runs[:2])):
        with pytest.raises(AssertionError, match="a bug"):
            each.result(MOST_SECONDS)
