"""Members of a cohort against the same runs alone."""

import gc
import math
import os
import signal
import threading
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from multiprocessing import active_children
from typing import Any

import pytest
import torch

from nanomoe.config import JobConfig
from nanomoe.plan import OutOfMemory
from nanomoe.tokenizer import load_tokenizer
from nanomoe.training import cohort
from nanomoe.training.cohort import Left, Member, ProcessDied, train_together
from nanomoe.training.loop import Happened, LossNotFinite, Steps, Stopped, StopReason, Undisturbed, train
from nanomoe.training.run import Recorded, Run, Snapshot, prepare
from nanomoe.training.steps.choice import StepPath

TEXT = "o rato roeu a roupa do rei de roma, e a rainha com raiva resolveu remendar. " * 4
TINY = {
    "tokenizer": "bytes", "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 16, "lr": 1e-2, "epochs": 3,
    "batch_size": 4, "cont_max_new_tokens": 4,
}  # fmt: skip
MOE = {"use_moe": True, "n_experts": 4, "moe_stride": 1, "capacity_factor": 1.0, "router_noise": True}
DIFFERENT: dict[str, dict[str, Any]] = {
    "plain": {},
    "seed": {"seed": 7, "lr": 3e-3, "weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-6, "grad_clip": 0.3},
    "longer": {"epochs": 5, "dropout": 0.0, "gradient_accumulation_steps": 2},
    "early": {"val_fraction": 0.3, "early_stopping_patience": 1, "lr": 1e-12, "epochs": 9},
    "mixture": MOE | {"seed": 3},
    "balanced": {"use_moe": True, "n_experts": 4, "router_bias_update_rate": 1e-2, "warmup_steps": 3},
}


def start(
    config: dict[str, Any], *, path: StepPath = "eager", text: str = TEXT, resume: dict[str, bytes] | None = None
) -> Run:
    parsed = JobConfig.model_validate(TINY | config)
    prepared = prepare(parsed, text, load_tokenizer("bytes"), path=path, n_threads=1, resume=resume)
    assert prepared.execution.path == path
    assert prepared.execution.n_threads == 1
    return prepared.run


def member(key: str, config: dict[str, Any] | None = None, **how: Any) -> Member:
    return Member(key, start(DIFFERENT[key] if config is None else config, **how), Undisturbed())


def by_member(events: Iterable[tuple[str, Happened | Left]]) -> dict[str, list[Happened | Left]]:
    found: dict[str, list[Happened | Left]] = defaultdict(list)
    for key, happened in events:
        found[key].append(happened)
    return found


def figures(events: Iterable[Happened | Left]) -> list[object]:
    """All that does not depend on a clock: the steps one by one, apart from whatever else happened, in its order."""
    steps = [
        row
        for event in events
        if isinstance(event, Steps)
        for row in zip(event.step, event.train_loss, event.lr, event.grad_norm, strict=True)
    ]
    others = [
        (event.metrics, event.files) if isinstance(event, Recorded) else event
        for event in events
        if not isinstance(event, Steps | Left)
    ]
    return [steps, others]


def alone(key: str, config: dict[str, Any] | None = None, **how: Any) -> list[object]:
    return figures(list(train(member(key, config, **how).run)))


class StopAfter(Undisturbed):
    """Asks for a stop once so many steps are done."""

    def __init__(self, run: Run, step: int, reason: StopReason = "drain") -> None:
        self.run, self.step, self.reason = run, step, reason

    def stop(self) -> StopReason | None:
        return self.reason if self.run.progress.step >= self.step else None


@pytest.mark.parametrize("n_processes", [1, 3])
@pytest.mark.parametrize("path", ["eager", "fused"])
def test_every_member_has_the_events_and_bytes_that_it_has_alone(path: StepPath, n_processes: int) -> None:
    texts = {"seed": TEXT[:20], "longer": TEXT + TEXT[:77]}
    how: dict[str, dict[str, Any]] = {key: {"path": path, "text": texts.get(key, TEXT)} for key in DIFFERENT}
    found = by_member(train_together([member(key, **how[key]) for key in DIFFERENT], n_processes=n_processes))
    for key in DIFFERENT:
        assert found[key][-1] == Left(None)
        assert figures(found[key]) == alone(key, **how[key]), key


def test_one_turn_for_each_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No member waits for the end of another."""
    monkeypatch.setattr(cohort, "_ROUND_SECONDS", 0.0)
    asked: list[str] = []

    class Asked(Undisturbed):
        def __init__(self, key: str) -> None:
            self.key = key

        def stop(self) -> StopReason | None:
            asked.append(self.key)
            return None

    members = [Member(key, start({"epochs": 40, "val_fraction": 0.0}), Asked(key)) for key in "abc"]
    events = train_together(members, n_processes=1)
    for _ in events:
        pass
    last = {key: len(asked) - asked[::-1].index(key) for key in "abc"}
    first = {key: asked.index(key) for key in "abc"}
    assert max(first.values()) < len(asked) / 10
    assert min(last.values()) > len(asked) * 9 / 10


@pytest.mark.parametrize("path", ["eager", "fused"])
def test_a_loss_that_is_not_finite_ends_its_member_alone(path: StepPath, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [member("plain", path=path), member("poison", {"epochs": 20}, path=path), member("longer", path=path)]
    train_step, n_steps = members[1].run.train_step, 0

    def step() -> Any:
        nonlocal n_steps
        n_steps += 1
        if n_steps == 5:
            with torch.no_grad():
                next(members[1].run.model.parameters()).fill_(math.nan)
        return train_step()

    monkeypatch.setattr(members[1].run, "train_step", step)
    found = by_member(train_together(members, n_processes=2))
    left = found["poison"][-1]
    assert isinstance(left, Left)
    assert isinstance(left.error, LossNotFinite)
    for key in ("plain", "longer"):
        assert figures(found[key]) == alone(key, path=path)


@pytest.mark.parametrize("error", [OutOfMemory("not even one window fits"), OSError("broken")])
def test_an_error_ends_its_member_alone(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [member("plain"), member("longer")]
    failing = members[0].run
    step = failing.train_step

    def fail() -> Any:
        if failing.progress.step == 3:
            raise error
        return step()

    monkeypatch.setattr(failing, "train_step", fail)
    found = by_member(train_together(members, n_processes=2))
    assert found["plain"][-1] == Left(error)
    assert figures(found["longer"]) == alone("longer")


@pytest.mark.parametrize("path", ["eager", "fused"])
@pytest.mark.parametrize("resumes_alone", [True, False])
def test_a_member_stopped_at_any_step_goes_on_alone_or_in_other_company(path: StepPath, resumes_alone: bool) -> None:
    total = start({}).plan.total_steps
    expected, of_other = alone("plain", path=path), alone("longer", path=path)
    for stopped_after in (
        0,
        1,
        5,
        total - 1,
    ):  # before the first checkpoint, right after it, between two, before the last
        run = start({}, path=path)
        members = [Member("plain", run, StopAfter(run, stopped_after)), member("longer", path=path)]
        before = by_member(train_together(members, n_processes=2))
        assert figures(before["longer"]) == of_other
        *_, stopped, left = before["plain"]
        assert left == Left(None)
        assert isinstance(stopped, Stopped)
        snapshots = [event for event in before["plain"] if isinstance(event, Snapshot)]
        resumed = start({}, path=path, resume=snapshots[-1].files if snapshots else None)
        if resumes_alone:
            after: list[Any] = list(train(resumed))
        else:
            company = [Member("plain", resumed, Undisturbed()), member("mixture", path=path)]
            after = by_member(train_together(company, n_processes=2))["plain"]
        events = [event for event in [*before["plain"], *after] if not isinstance(event, Snapshot | Stopped)]
        assert figures(events) == expected, f"stopped after step {stopped_after}"


def test_a_stop_in_the_first_checkpoint_forgets_no_quarter_of_the_same_step() -> None:
    short = {"max_steps": 4}  # the first step is the first quarter
    run = start(short)
    before = by_member(train_together([Member("short", run, StopAfter(run, 1))]))["short"]
    snapshot = next(event for event in before if isinstance(event, Snapshot))
    assert [type(event) for event in before] == [Steps, Snapshot, Stopped, Left]
    after = list(train(start(short, resume=snapshot.files)))
    assert [event.percent for event in after if isinstance(event, Recorded)] == [0, 25, 50, 75, 100]
    events = [event for event in [*before, *after] if not isinstance(event, Snapshot | Stopped)]
    assert figures(events) == alone("short", short)


@pytest.mark.parametrize("path", ["eager", "fused"])
def test_whoever_closes_it_ends_all_members_and_leaves_no_thread_and_no_process(path: StepPath) -> None:
    threads = set(threading.enumerate())
    n_threads = torch.get_num_threads()
    members = [Member(key, start({"epochs": 10_000}, path=path), Undisturbed()) for key in "abc"]
    events = train_together(members, n_processes=2)
    for _ in range(5):
        next(events)
    children = active_children()
    assert len(children) == (2 if path == "fused" else 0)
    events.close()
    assert active_children() == []
    assert set(threading.enumerate()) <= threads
    assert torch.get_num_threads() == n_threads


def test_what_other_processes_train_is_held_by_nobody_but_the_caller() -> None:
    members = [Member(key, start({"epochs": 10_000}, path="fused"), Undisturbed()) for key in "ab"]
    runs = [weakref.ref(each.run) for each in members]
    events = train_together(members, n_processes=2)
    members.clear()
    next(events)
    gc.collect()
    assert [run() for run in runs] == [None, None]
    events.close()


def test_a_stop_that_is_asked_for_here_reaches_the_process_that_trains() -> None:
    class Asked(Undisturbed):
        reason: StopReason | None = None

        def stop(self) -> StopReason | None:
            return self.reason

    controls = {key: Asked() for key in "ab"}
    members = [Member(key, start({"epochs": 100_000}, path="fused"), controls[key]) for key in "ab"]
    ended: dict[str, list[Happened | Left]] = defaultdict(list)
    for key, happened in train_together(members, n_processes=2):
        ended[key].append(happened)
        controls["a"].reason = "pause"
        if isinstance(happened, Left):
            controls["b"].reason = "cancel"
    assert [type(event) for event in ended["a"][-3:]] == [Snapshot, Stopped, Left]
    assert [event.reason for key in "ab" for event in ended[key] if isinstance(event, Stopped)] == ["pause", "cancel"]
    assert not any(isinstance(event, Snapshot) for event in ended["b"])


def test_a_process_that_dies_is_said_with_what_ended_it() -> None:
    members = [Member(key, start({"epochs": 10_000}, path="fused"), Undisturbed()) for key in "ab"]
    events = train_together(members, n_processes=2)
    next(events)
    killed = active_children()[0].pid
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    with pytest.raises(ProcessDied) as died:
        for _ in events:
            pass
    assert died.value.exit_code == -signal.SIGKILL
    assert active_children() == []


def test_an_error_without_a_name_comes_from_the_process_that_trains_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(Exception):
        """Cannot be sent: nobody finds this class by its name."""

    members = [member("plain", path="fused"), member("longer", path="fused")]

    def fail() -> Any:
        raise Odd("broken")

    monkeypatch.setattr(members[0].run, "train_step", fail)
    found = by_member(train_together(members, n_processes=2))
    left = found["plain"][-1]
    assert isinstance(left, Left)
    assert str(left.error) == "Odd('broken')"
    assert figures(found["longer"]) == alone("longer", path="fused")


def test_a_member_that_has_left_is_held_by_nobody_but_its_caller() -> None:
    def members() -> Iterator[Member]:
        yield Member("short", start({"epochs": 1}), Undisturbed())
        yield Member("long", start({"epochs": 10_000}), Undisturbed())

    given = list(members())
    run = weakref.ref(given[0].run)
    events = train_together(tuple(given), n_processes=1)
    given.clear()
    for key, happened in events:
        if (key, happened) == ("short", Left(None)):
            break
    next(events)
    gc.collect()
    assert run() is None
    events.close()


def test_several_threads_of_a_member_need_a_cpu_of_its_own() -> None:
    parsed = JobConfig.model_validate(TINY)
    wide = prepare(parsed, TEXT, load_tokenizer("bytes"), n_threads=2).run
    with pytest.raises(ValueError, match="one thread each; wide"):
        next(train_together([member("plain"), Member("wide", wide, Undisturbed())]))
    assert by_member(train_together([Member("wide", wide, Undisturbed())]))["wide"][-1] == Left(None)


def test_keys_are_unique() -> None:
    with pytest.raises(ValueError, match="same key"):
        next(train_together([member("plain"), member("plain")]))


def test_no_members_have_no_events() -> None:
    assert list(train_together([])) == []
