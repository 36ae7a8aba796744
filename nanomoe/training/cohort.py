"""Runs trained together: each member's own loop, in turns by the forks of a process on a CPU, as one program on a GPU.

On a CPU one thread trains one small model faster than several threads do, which wait for each other; so the cores are
shared among the members and not within one. Each core has a process for them, a fork of this one, since threads of one
process would wait for its interpreter: a small step is half Python. A member's events are those of
`nanomoe.training.loop.train` of it alone, and so is every bit of them, whatever its company: nothing that a member
computes with is another's.

On a GPU the steps of all are one program (`stack`, `nanomoe.training.steps.stacked`): the loops go on by a step each,
then the program does these steps. Its members' checkpoints are made beside the steps by one thread, those of one step
together (`nanomoe.training.cohort_thread`).

Knows no job, no database and no folder, as the loop.
"""

import logging
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess

import torch

from nanomoe.processes import die_with_parent
from nanomoe.training.beside import BESIDE, STOP_SECONDS, Waits
from nanomoe.training.cohort_thread import CohortThread
from nanomoe.training.loop import Control, Happened, LossNotFinite, OutOfMemory, Run, StopReason, train_in_turns
from nanomoe.training.memory import is_out_of_memory
from nanomoe.training.run import Warned
from nanomoe.training.steps.choice import CAPTURING
from nanomoe.training.steps.stacked import Lane, StackedSteps
from nanomoe.training.steps.step import CaptureFailed

__all__ = ["Left", "Member", "ProcessDied", "stack", "train_together"]

log = logging.getLogger(__name__)

_ROUND_SECONDS = 0.5
"""In which every member of a process should have had a turn, if each of its steps is short enough: so long a stop that
is asked for waits, and so often a member reports its steps. Turns are as long as that allows, since a model's weights
are in the processor's caches after its first step."""

_RELAY_SECONDS = 0.05
"""So often the members' controls are asked for what the processes that train them are to be told."""

_STOPS: tuple[StopReason | None, ...] = (None, "cancel", "pause", "drain")
"""What is told, by the number that tells it."""


@dataclass(frozen=True)
class Member:
    """One of the runs that are trained together."""

    key: str
    """What the caller calls it; no two members have the same."""
    run: Run
    """Prepared; where several members share a CPU, with one thread (`n_threads` of `prepare`)."""
    control: Control
    """Its own stops and snapshots. Where the run is trained by another process, a stop is asked for here and there, and
    a snapshot there, of the control as it was when that process began."""


@dataclass(frozen=True)
class Left:
    """The member's last event: it has ended, was stopped, or failed."""

    error: Exception | None
    """What its loop raised: `LossNotFinite` and `OutOfMemory` are the member's own, any other is a bug or a broken
    machine, of which the caller decides what it means for the other members."""


def stack(runs: Sequence[Run], width: int) -> None:
    """Have the steps of these runs, prepared with the path `stacked` and of one shape, done by one program of `width`
    models. Where it cannot be captured, each goes on operator by operator, and says so.

    Raises:
        OutOfMemory: so many models do not fit.
    """
    graphs = CAPTURING[runs[0].device.type](runs[0].device)
    members = [(run.model, run.windows, run.config) for run in runs]
    try:
        program = StackedSteps(members, runs[0].activations, graphs, width)
    except CaptureFailed as error:
        message = f"steps are done operator by operator, job by job: {error}"
        log.warning("step_not_captured: %s", message)
        for run in runs:
            run.warnings.append(Warned("step_not_captured", message))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"{width} models at once do not fit the memory: {error}") from error
    else:
        for run, lane in zip(runs, program.lanes, strict=True):
            run.join(lane)


class ProcessDied(RuntimeError):
    """A process that trained some of the members has ended before they did."""

    def __init__(self, exit_code: int) -> None:
        """`exit_code`: as `multiprocessing.Process` has it, negative for a signal."""
        super().__init__(f"a process of the cohort ended with {exit_code}")
        self.exit_code = exit_code


def train_together(
    members: Sequence[Member], *, n_processes: int | None = None
) -> Generator[tuple[str, Happened | Left], None, None]:
    """Train all members, each to its end; what happened, with the key of the member that it happened to.

    Of each member the events of `train` in their order, then `Left`. The last `Left` ends it; who closes it before ends
    all members as a cancel would, and neither thread nor process is left either way. A caller that takes nothing stops
    them all, sooner or later.

    Fused steps are done by `n_processes` forks of this process, one for each core by default; all others in the
    caller's thread. A run that was trained by a fork stands here where it stood: whoever holds it holds memory for
    nothing.

    Raises:
        ValueError: two members have the same key, or one of several on a CPU has several threads: products would take
            those of another member.
        ProcessDied: with it, all members have ended.
    """
    if len({member.key for member in members}) < len(members):
        raise ValueError("two members have the same key")
    if len(members) > 1:
        wide = [each.key for each in members if each.run.device.type == "cpu" and each.run.n_threads != 1]
        if wide:
            raise ValueError(f"members that share a CPU need one thread each; {', '.join(wide)} have more")
    if any(isinstance(member.run.step, Lane) for member in members):
        return _in_turns(list(members), 0.0)
    n = min(n_processes or _cores(), len(members)) if _may_fork(members) else 1
    return _forked(list(members), n) if n > 1 else _in_turns(list(members), _ROUND_SECONDS)


def _may_fork(members: Sequence[Member]) -> bool:
    """Whether what these members do can be done in a fork. Where torch sees a GPU, its autograd refuses to go on in
    one: gradients of fused steps are not autograd's, but those that a mixture's evaluation looks at are."""
    if sys.platform != "linux" or any(member.run.path != "fused" for member in members):
        return False
    return not (any(member.run.config.use_moe for member in members) and torch.cuda.is_available())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_turns(members: list[Member], round_seconds: float) -> Generator[tuple[str, Happened | Left], None, None]:
    """`train_together` in this thread: each loop goes on for its part of a round, one step at least, and then the
    programs of those that are stacked do these steps."""
    n_threads = torch.get_num_threads()
    lanes = {member.key: member.run.step for member in members if isinstance(member.run.step, Lane)}
    has_beside = bool(lanes) or any(member.run.device.type in BESIDE for member in members)
    beside = CohortThread() if has_beside else None
    loops = {member.key: _Loop(member, beside) for member in members}
    members.clear()  # those that have left are the caller's to free
    try:
        while loops:
            turn = round_seconds / len(loops)
            has_stepped = False
            due = dict(loops)
            """Those whose turn of this round is not over. A program does no step before all of its members have theirs
            ready: one that waits for what is made beside the steps holds the others up, unless it has left."""
            while due:
                for key, loop in list(due.items()):
                    end = time.monotonic() + turn
                    while (happened := loop.advance(end)) is not None and not isinstance(happened, Waits):
                        if isinstance(happened, Left):
                            del loops[key]
                            if key in lanes:
                                lanes.pop(key).leave()
                        yield key, happened
                        if isinstance(happened, Left):
                            break
                    has_stepped |= happened is None
                    if not isinstance(happened, Waits) or key not in lanes or lanes[key].has_left:
                        del due[key]
                    del loop
                if beside is not None and due:
                    beside.wait(STOP_SECONDS)
            if beside is not None:
                beside.start()  # only now, so that what comes after the same step is one batch
                if not has_stepped:
                    beside.wait(STOP_SECONDS)
            for program in {lane.program for lane in lanes.values() if not lane.has_left}:
                program.advance()
    finally:
        for loop in loops.values():
            loop.close()
        if beside is not None:
            beside.close()
        torch.set_num_threads(n_threads)


class _Loop:
    """A member's loop."""

    def __init__(self, member: Member, beside: CohortThread | None) -> None:
        self._n_threads = member.run.n_threads
        self._turns = train_in_turns(member.run, member.control, beside)

    def advance(self, end: float) -> Happened | Waits | Left | None:
        """Do at least one step or event, and steps until then, a monotonic time; None if nothing else happened."""
        torch.set_num_threads(self._n_threads)
        try:
            for happened in self._turns:
                if happened is not None or time.monotonic() >= end:
                    return happened
        except Exception as error:
            return Left(error)
        return Left(None)

    def close(self) -> None:
        """End it where it stands."""
        self._turns.close()


def _forked(members: list[Member], n: int) -> Generator[tuple[str, Happened | Left], None, None]:
    """`train_together` by `n` forks, of which each advances its part of the members in turns."""
    context = multiprocessing.get_context("fork")
    stops = mmap.mmap(-1, len(members))  # a number of `_STOPS` for each, in memory that the forks share
    controls = [member.control for member in members]
    told = [replace(m, control=_Told(m.control, stops, place)) for place, m in enumerate(members)]
    processes: dict[Connection, ForkProcess] = {}
    try:
        for first in range(n):
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(target=_train_share, args=[told[first::n], sending, os.getpid()], daemon=True)
            with warnings.catch_warnings():  # of threads that hold a lock: those of this process hold none that is used
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            processes[receiving] = process
            sending.close()
        members.clear()
        told.clear()
        while processes:
            for place, control in enumerate(controls):
                stops[place] = _STOPS.index(control.stop())
            ready = wait(list(processes), _RELAY_SECONDS)
            for pipe in [pipe for pipe in processes if pipe in ready]:
                try:
                    key, happened = pipe.recv()
                except EOFError:
                    ended = processes.pop(pipe)
                    ended.join()
                    pipe.close()
                    if ended.exitcode:
                        raise ProcessDied(ended.exitcode) from None
                else:
                    yield key, happened
    finally:
        for pipe, process in processes.items():
            process.kill()
            process.join()
            pipe.close()
        stops.close()


def _train_share(members: list[Member], sending: Connection, parent: int) -> None:
    """What a fork does."""
    try:
        die_with_parent(parent)
        for ignored in (signal.SIGTERM, signal.SIGINT):  # the parent decides
            signal.signal(ignored, signal.SIG_IGN)
        for key, happened in _in_turns(members, _ROUND_SECONDS):
            sending.send((key, _sendable(happened)))
    except BaseException:
        log.exception("cohort_process_failed")
        os._exit(1)
    os._exit(0)  # without cleanup: it would be that of the parent


def _sendable(happened: Happened | Left) -> Happened | Left:
    """The event as another process can read it. An error loses its traceback, which goes to the log."""
    if not isinstance(happened, Left) or happened.error is None:
        return happened
    if not isinstance(happened.error, LossNotFinite | OutOfMemory):
        log.error("cohort_member_failed", exc_info=happened.error)
    try:
        pickle.loads(pickle.dumps(happened.error))  # noqa: S301 - what was made here
    except Exception:
        return Left(RuntimeError(repr(happened.error)))
    return happened


class _Told:
    """The control of a member in the process that trains it."""

    def __init__(self, control: Control, stops: mmap.mmap, place: int) -> None:
        self._control, self._stops, self._place = control, stops, place

    def stop(self) -> StopReason | None:
        return _STOPS[self._stops[self._place]] or self._control.stop()

    def snapshot_due(self) -> bool:
        return self._control.snapshot_due()
