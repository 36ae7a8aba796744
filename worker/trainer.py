"""The child process that trains one job after another, or several together as a cohort: it reads them from stdin and
reports on stdout, one message a line.

Knows no database: all its input comes from its supervisor, and it exits when the supervisor is gone. It is started
before there is a job, imports torch, touches no GPU and waits. Between two jobs nothing of the first is left but, on
a GPU, the captured step for the next job of its shape; where that is not certain, after a failure for example, the
process exits, and the supervisor starts another.
"""

import argparse
import faulthandler
import functools
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Literal, NoReturn, get_args

from nanomoe.config import JobConfig
from nanomoe.logs import LogFormat, configure_logging
from nanomoe.processes import die_with_parent
from nanomoe.store.opening import open_store
from nanomoe.store.store import Store, StoreError
from worker.compiler import STEP_PATH_VARIABLE
from worker.memory import use_one_arena
from worker.protocol import (
    AboutJob,
    Assignment,
    CheckpointWritten,
    Done,
    Failure,
    Folder,
    FromTrainer,
    Idle,
    Prepared,
    Ready,
    SnapshotWritten,
    Start,
    Steps,
    StopReason,
    Warned,
    encode_from_trainer,
)
from worker.supervision import Supervision

if TYPE_CHECKING:
    from nanomoe.checkpoint import OpenCheckpoint
    from nanomoe.tokenizer import Tokenizer
    from nanomoe.training.loop import Happened
    from nanomoe.training.run import Recorded, Run, Snapshot, Weights
    from nanomoe.training.steps.kept import KeptSteps
    from nanomoe.training.steps.kernels.compiling import KernelCompiler

log = logging.getLogger(__name__)

Outcome = Literal["succeeded", "stopped", "failed"]


class Channel:
    """The pipe to the supervisor. Only messages are written to it: whatever else prints to stdout goes to the log."""

    def __init__(self) -> None:
        self._pipe = os.dup(1)
        os.dup2(2, 1)
        self._mutex = threading.Lock()

    def send(self, message: FromTrainer, assignment: Assignment | None = None) -> None:
        """Write one message, about this attempt or about none, as one line. Thread-safe."""
        line = encode_from_trainer(message, assignment)
        with self._mutex:
            while line:
                line = line[os.write(self._pipe, line) :]


class JobChannel:
    """The channel for the messages about one job."""

    def __init__(self, channel: Channel, assignment: Assignment) -> None:
        self._channel, self._assignment = channel, assignment

    def send(self, message: AboutJob) -> None:
        """`Channel.send` of a message about this job."""
        self._channel.send(message, self._assignment)


class TrainingControl:
    """Tells the training loop between two steps whether to stop, and whether a snapshot is due."""

    def __init__(self, supervision: Supervision, start: Start) -> None:
        self._supervision = supervision
        self._assignment = start.assignment
        self._snapshot_seconds = start.snapshot_seconds
        self._last = time.monotonic()
        self.failed = False
        """Whether what this job leaves cannot be written: it stops, whatever is asked of it."""

    def stop(self) -> StopReason | None:
        return "cancel" if self.failed else self._supervision.stop_of(self._assignment)

    def snapshot_due(self) -> bool:
        if time.monotonic() - self._last < self._snapshot_seconds:
            return False
        self._last = time.monotonic()
        return True


class Writer:
    """Writes checkpoints and snapshots in a thread, in their order, and reports each once it is complete in the store.

    Training goes on meanwhile: what was yielded is bytes, which nothing changes any more. At most one folder waits, so
    that a slow store slows training and does not fill the memory.
    """

    def __init__(self, channel: JobChannel, folder: Store, fence: int) -> None:
        self._channel, self._folder, self._fence = channel, folder, fence
        self._last_snapshot: int | None = None
        self._end: Callable[[Exception | None], None] = lambda _: None
        self._waiting: Queue[Recorded | Snapshot | None] = Queue(maxsize=1)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="writer")
        self._thread.start()

    def write(self, what: "Recorded | Snapshot") -> None:
        """Raises what writing an earlier folder raised."""
        self._waiting.put(what)
        self._raise_if_failed()

    def close(self) -> None:
        """Wait until everything is in the store. Raises what writing raised."""
        self._waiting.put(None)
        self._thread.join()
        self._raise_if_failed()

    def end(self, end: Callable[[Exception | None], None]) -> None:
        """Write nothing more, and call `end` in the writer's thread once everything is in the store, with what writing
        raised, if anything: whoever trains other jobs meanwhile does not wait."""
        self._end = end
        self._waiting.put(None)

    def join(self) -> None:
        """Wait until `end` was called."""
        self._thread.join()

    def _raise_if_failed(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (what := self._waiting.get()) is not None:
            if self._error is None:
                try:
                    self._commit(what)
                except Exception as error:  # raised again in the training loop's thread
                    self._error = error
        self._end(self._error)

    def _commit(self, what: "Recorded | Snapshot") -> None:
        from nanomoe import checkpoint
        from nanomoe.training.run import Recorded

        if isinstance(what, Recorded):
            name = checkpoint.folder_name(self._fence, what.percent)
            manifest, sha256 = checkpoint.write(self._folder / name, what.files)
            self._channel.send(
                CheckpointWritten(
                    folder=name,
                    manifest_sha256=sha256,
                    files=manifest.files,
                    metrics=what.metrics,
                    tok_per_sec=what.tok_per_sec,
                )
            )
        elif what.step != self._last_snapshot:  # a stop right after a quarter asks for the same one again
            name = checkpoint.snapshot_name(self._fence, what.step)
            _, sha256 = checkpoint.write(self._folder / name, what.files)
            self._last_snapshot = what.step
            self._channel.send(SnapshotWritten(step=what.step, folder=name, manifest_sha256=sha256))


def run_job(start: Start, channel: JobChannel, supervision: Supervision, kept_steps: "KeptSteps") -> Done:
    """Train the job to its end, to a stop, or to a failure that has a name.

    Any other exception is a bug or a broken machine: the process ends without a `Done` message, which counts as a
    crash.
    """
    writer = Writer(channel, open_store(start.folder), start.fence)
    try:
        try:
            outcome = _train(start, channel, supervision, writer, kept_steps)
        finally:
            writer.close()
    except Exception as error:
        return _failed(error)
    return Done(outcome=outcome)


def _train(
    start: Start, channel: JobChannel, supervision: Supervision, writer: Writer, kept_steps: "KeptSteps"
) -> Outcome:
    from nanomoe.training import loop

    run = _prepare(start, channel, kept_steps)
    outcome: Outcome = "succeeded"
    for happened in loop.train(run, TrainingControl(supervision, start)):
        if isinstance(happened, loop.Stopped):
            outcome = "stopped"
        else:
            _report(happened, channel, writer)
    run.keep_step()
    return outcome


def _report(happened: "Happened", channel: JobChannel, writer: Writer) -> None:
    """Send what happened to the supervisor, or have it written first. Raises what writing an earlier folder raised."""
    from nanomoe.training import loop

    match happened:
        case loop.Steps():
            channel.send(Steps(**asdict(happened)))
        case loop.Warned():
            channel.send(Warned(**asdict(happened)))
        case loop.Recorded() | loop.Snapshot():
            writer.write(happened)
        case loop.Stopped():
            raise AssertionError("an end is nothing to report")


def _failed(error: Exception) -> Done:
    """The end of a job that failed. Raises the error again where it has no name."""
    failure = _explain(error)
    if failure is None:
        raise error
    return Done(outcome="failed", error=failure)


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
                _report(happened, self.channel, self.writer)
            except Exception:  # the writer says it again at the end
                self.control.failed = True

    def leave(self, error: Exception | None) -> None:
        """The others go on without it; `Done` is sent as soon as all that it left is on the disk. Raises an error that
        has no name."""
        self.has_left = True
        end = Done(outcome="stopped" if self._was_stopped else "succeeded") if error is None else _failed(error)

        def send_done(writing_failed: Exception | None) -> None:
            try:
                self.done = end if writing_failed is None or end.error is not None else _failed(writing_failed)
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
        _failed(error)
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
            prepared.append((member, _prepare(member.start, member.channel, n_threads=1, width=width)))
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


def _is_stacked(start: Start) -> bool:
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


def _prepare(
    start: Start,
    channel: JobChannel,
    kept_steps: "KeptSteps | None" = None,
    n_threads: int | None = None,
    width: int | None = None,
) -> "Run":
    """Everything from the start message to a model that can train, on its device. `width`: models of the stacked
    program that is going to train it."""
    from nanomoe.model.size import n_active_params, n_params
    from nanomoe.training.run import prepare

    text = Path(start.text_path).read_bytes().decode()
    tokenizer, parent, resume = _read_origin(start, text)
    prepared = prepare(
        start.config,
        text,
        tokenizer,
        device=start.device,
        recorded_execution=start.execution,
        parent=parent,
        resume=resume,
        kept_steps=kept_steps,
        n_threads=n_threads,
        path=None if width is None else "stacked",
        width=width,
    )
    run, execution = prepared.run, prepared.execution
    if execution.path == "captured" and STEP_PATH_VARIABLE not in os.environ:
        variant = execution.kernels(start.config, prepared.n_tokens)
        if variant.not_compiled_because() and _kernel_compiler().start(variant, start.device):
            log.info("kernels_compiling: a later job of such a model will have them")
    channel.send(
        Prepared(
            execution=execution.model_dump(mode="json"),
            n_tokens=prepared.n_tokens,
            total_steps=run.plan.total_steps,
            n_params=n_params(start.config, tokenizer.vocab_size),
            n_active_params=n_active_params(start.config, tokenizer.vocab_size),
            resumed_at_step=run.progress.step if resume is not None else None,
            warnings=prepared.warnings,
        )
    )
    return run


@functools.cache
def _kernel_compiler() -> "KernelCompiler":
    """The one of this process, which knows what it has tried."""
    from nanomoe.training.steps.kernels.compiling import KernelCompiler

    return KernelCompiler()


def _read_origin(start: Start, text: str) -> "tuple[Tokenizer, Weights | None, dict[str, bytes] | None]":
    """The tokenizer, the parent's weights and the snapshot's files, every byte verified.

    The tokenizer is that of the snapshot or checkpoint that training starts from, where there is one: the config's name
    may stand for another tokenizer by now.

    Raises:
        ParentUnusable: a file of the parent is missing or damaged.
        CheckpointDamaged: a file of the snapshot, or of the checkpoint that holds the tokenizer, is.
        StoreError: one of them cannot be read now.
        TokenizerError: the config's tokenizer cannot be loaded or trained.
    """
    from nanomoe import checkpoint
    from nanomoe.lineage import ParentUnusable
    from nanomoe.tokenizer import Tokenizer, load_tokenizer

    if start.resume is not None:
        files = _open(start.resume, start).read_all()
        return Tokenizer.of_files(files), None, files
    if start.parent is not None:
        assert start.config.init_from is not None, "a parent is named in init_from"
        try:
            parent = _open(start.parent, start)
            return parent.tokenizer(), parent.weights(), None
        except checkpoint.CheckpointDamaged as error:
            raise ParentUnusable(start.config.init_from, error) from error
    if start.tokenizer is not None:
        return _open(start.tokenizer, start).tokenizer(), None, None
    folders = () if start.tokenizer_dir is None else (Path(start.tokenizer_dir),)
    tokenizer = load_tokenizer(start.config.tokenizer, text=text, allow_hub=start.allow_hub, allowed_folders=folders)
    return tokenizer, None, None


def _open(folder: Folder, start: Start) -> "OpenCheckpoint":
    from nanomoe import checkpoint

    return checkpoint.open(open_store(folder.folder, start.cache), folder.manifest_sha256)


def _explain(error: Exception) -> Failure | None:
    """Why the job failed: an error that follows from the job itself, or an error of the store; None for any other
    exception."""
    from nanomoe import checkpoint
    from nanomoe.errors import NanomoeError
    from nanomoe.plan import OutOfMemory
    from nanomoe.training.memory import is_out_of_memory

    if isinstance(error, NanomoeError):
        return Failure(code=error.code, message=str(error))
    if is_out_of_memory(error):
        return Failure(code=OutOfMemory.code, message=str(error))
    if isinstance(error, StoreError):
        log.error("%s: %s", error.code, error)
        return Failure(code=error.code, message=error.summary)
    if checkpoint.is_disk_full(error):
        return Failure(code="disk_full", message=f"the disk is full: {error}")
    if isinstance(error, OSError):
        return Failure(code="storage_failed", message=f"a file could not be read or written: {error!r}")
    return None


def main() -> NoReturn:
    """Warm up, then train job after job until the process should exit."""
    options = _parser().parse_args()
    die_with_parent(options.parent)
    use_one_arena()
    configure_logging(options.log_format)
    channel = Channel()
    supervision = Supervision(options.until)
    faulthandler.enable()
    # The message holds the request; the supervisor's signal only interrupts a system call of the main thread.
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: supervision.terminated())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cohort = _warm_up(measures_cohort=options.measure_cohort)
    train_jobs(channel, supervision, cohort)
    sys.stderr.flush()
    if supervision.should_exit:
        # Die by SIGTERM, so that the supervisor counts no crash for a job that was just sent.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    # Exit without cleanup: tearing down torch takes longer than a short job.
    os._exit(0)


def train_jobs(channel: Channel, supervision: Supervision, cohort: int | None = None) -> None:
    """Train job after job, until one fails or leaves something behind, or someone asks the process to exit. `cohort`:
    most jobs that it should be given together, where that was measured."""
    from nanomoe.training.steps.kept import KeptSteps
    from worker.process_state import ProcessState

    kept_steps = KeptSteps()
    new_state = ProcessState(kept_steps.forget)
    channel.send(Ready(cohort=cohort))
    while (assigned := supervision.wait_for_jobs()) is not None:
        starts, lock = assigned
        new_state.restore()
        if len(starts) == 1 and not _is_stacked(starts[0]):
            about_job = JobChannel(channel, starts[0].assignment)
            done = run_job(starts[0], about_job, supervision, kept_steps)
            about_job.send(done)
            none_failed = done.outcome != "failed"
        else:
            none_failed = run_cohort(starts, channel, supervision)
        if not none_failed or supervision.should_exit:
            return
        if (left := new_state.what_is_left()) is not None:
            log.warning("trainer_exits: %s", left)
            return
        # Closed, never unlocked: a child of a job that still lives keeps the slot locked.
        os.close(lock)
        channel.send(Idle())


def _warm_up(*, measures_cohort: bool) -> int | None:
    """Import what a job needs, train a toy to its end, and a step at the default size: much of torch is loaded, and its
    kernels are chosen, by the first step of a kind only. Touches no GPU. Returns how many jobs should be trained
    together on this CPU, if that is to be measured."""
    gc.disable()  # nothing that an import makes is garbage: a tenth of its time went into looking for some
    import torch

    from nanomoe.compiling import start_threads
    from nanomoe.tokenizer import BUNDLED, load_tokenizer
    from nanomoe.training.loop import train
    from nanomoe.training.run import prepare

    def run_of(config: JobConfig, text: str) -> "Run":
        return prepare(config, text, load_tokenizer(config.tokenizer)).run

    toy = JobConfig(tokenizer="bytes", block_size=4, n_layer=2, n_head=1, n_embd=4, use_moe=True, epochs=1)
    for _ in train(run_of(toy, "warm up")):
        pass
    run_of(JobConfig(tokenizer=BUNDLED), "Era uma vez " * 30).train_step()
    start_threads()
    cohort: int | None = None
    if measures_cohort:
        from nanomoe.training.cohort_width import measured_cohort_width

        cohort = measured_cohort_width(torch.get_num_threads())
    # What is there now stays: to search it after every job for what is unreachable took 0.15 s (measured).
    gc.collect()
    gc.freeze()
    gc.enable()
    return cohort


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m worker.trainer", description="Started by a worker.")
    parser.add_argument("--parent", type=int, required=True, help="process id of the supervisor")
    parser.add_argument(
        "--until",
        type=float,
        required=True,
        help="monotonic time to exit at without a later keep-alive",
    )
    parser.add_argument("--measure-cohort", action="store_true", help="measure how many jobs to train together")
    parser.add_argument("--log-format", choices=get_args(LogFormat), default="console")
    return parser


if __name__ == "__main__":
    main()
