"""Several jobs trained together in the trainer's process: which of them one program trains, and how each leaves.

What a member is by itself is `worker.job_trainer`'s to know.
"""

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nanomoe.store.opening import open_store
from worker.channel import Channel, JobChannel
from worker.job_trainer import TrainingControl, Writer, failed_end, prepare_run, report
from worker.protocol import Done, Start
from worker.supervision import Supervision

if TYPE_CHECKING:
    from nanomoe.training.loop import Happened
    from nanomoe.training.run import Run

log = logging.getLogger(__name__)


class _Member:
    """One of the jobs that are trained together."""

    def __init__(self, start: Start, channel: Channel, supervision: Supervision) -> None:
        self.start = start
        self.channel = JobChannel(channel, start.assignment)
        self.control = TrainingControl(supervision, start)
        self.writer = Writer(self.channel, open_store(start.folder), start.fence)
        self.done: Done | None = None
        """How it ended, once it has left."""
        self.has_left = False
        self._was_stopped = False

    @property
    def key(self) -> str:
        return self.start.job_id

    def handle(self, happened: "Happened") -> None:
        """Report what happened to this job. One whose files cannot be written leaves before its next step."""
        from nanomoe.training import loop

        if isinstance(happened, loop.Stopped):
            self._was_stopped = True
        elif not self.control.failed:
            try:
                report(happened, self.channel, self.writer)
            except Exception:  # the writer says it again at the end
                self.control.failed = True

    def leave(self, error: Exception | None) -> None:
        """The others go on without it; `Done` is sent as soon as all that it left is on the disk. Raises an error that
        has no name."""
        self.has_left = True
        end = Done(outcome="stopped" if self._was_stopped else "succeeded") if error is None else failed_end(error)

        def send_done(writing_failed: Exception | None) -> None:
            try:
                self.done = end if writing_failed is None or end.error is not None else failed_end(writing_failed)
            except Exception:
                log.exception("writer_failed")  # a bug: it counts as a crash, of this process
                os._exit(1)
            self.channel.send(self.done)

        self.writer.end(send_done)


def run_cohort(starts: Sequence[Start], channel: Channel, supervision: Supervision) -> bool:
    """Train jobs together, each to its end, to a stop, or to a failure that has a name; `Done` is sent for each. True
    when none has failed.

    Any other exception ends the process, and counts as a crash of every job that has not ended.
    """
    import torch

    from nanomoe.training.cohort import Left, ProcessDied, train_together
    from nanomoe.training.cohort import Member as InTraining

    cores = torch.get_num_threads()  # as many as this process may have, until a job says otherwise
    members = {start.job_id: _Member(start, channel, supervision) for start in starts}
    in_training = [
        InTraining(member.key, run, member.control)
        for program, width in _programs(starts)
        for member, run in _prepare_program([members[start.job_id] for start in program], width)
    ]
    try:
        events = train_together(in_training, n_processes=cores)
        in_training.clear()  # what other processes train is to be in their memory alone
        for key, happened in events:
            if isinstance(happened, Left):
                members[key].leave(happened.error)
            else:
                members[key].handle(happened)
    except ProcessDied as died:
        if died.exit_code < 0:  # the supervisor is to see what ended it: memory that ran out, for example
            os.kill(os.getpid(), -died.exit_code)
        raise
    except Exception as error:
        # Of the program, not of one job: each that is still in it ends with it, where the error has a name.
        failed_end(error)
        for member in members.values():
            if not member.has_left:
                member.leave(error)
    for member in members.values():
        member.writer.join()
    return all(member.done is not None and member.done.outcome != "failed" for member in members.values())


def _prepare_program(members: Sequence[_Member], width: int | None) -> "list[tuple[_Member, Run]]":
    """The runs of members that one program trains, of so many models; of each its own where that is None. Those that
    fail have left."""
    from nanomoe.training.cohort import stack

    prepared = []
    for member in members:
        try:
            prepared.append((member, prepare_run(member.start, member.channel, n_threads=1, width=width)))
        except Exception as error:
            member.leave(error)
    if width is not None and prepared:
        try:
            stack([run for _, run in prepared], width)
        except Exception as error:
            for member, _ in prepared:
                member.leave(error)
            return []
    return prepared


def is_stacked(start: Start) -> bool:
    """Whether the job began in a program that trained several, and so goes on in one of that width."""
    return start.execution is not None and start.execution.get("width") is not None


def _programs(starts: Sequence[Start]) -> list[tuple[list[Start], int | None]]:
    """Who is trained by one program, and the models that it has; None where each job has steps of its own.

    On a device whose work is captured, jobs that begin now are stacked, all of them; one that began in a stacked
    program goes on in one of the same width, for its bytes depend on that.
    """
    if not _is_captured(starts[0].device):
        return [(list(starts), None)]
    new = [start for start in starts if start.execution is None]
    widths: dict[int | None, list[Start]] = {}
    for start in starts:
        if start.execution is not None:
            widths.setdefault(start.execution.get("width"), []).append(start)
    programs: list[tuple[list[Start], int | None]] = [(new, len(new) if len(new) > 1 else None)]
    for width, resumed in widths.items():
        n = width or len(resumed)
        programs += [(resumed[first : first + n], width) for first in range(0, len(resumed), n)]
    return programs


def _is_captured(device: str) -> bool:
    """Whether steps on this device are captured; not so on one that is not there, of which each job will say so."""
    from nanomoe.training.execution import DeviceUnavailable, find_device
    from nanomoe.training.steps.choice import not_captured_because

    try:
        return not_captured_because(find_device(device)) is None
    except DeviceUnavailable:
        return False
