"""The child process that trains one job after another: it reads each from stdin and reports on stdout, one message a
line.

Knows no database: all its input comes from its supervisor, and it exits when the supervisor is gone. It is started
before there is a job, imports torch, touches no GPU and waits. Between two jobs nothing of the first is left; where
that is not certain, after a failure for example, the process exits, and the supervisor starts another.
"""

import argparse
import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Literal, NoReturn, get_args

from nanomoe.config import JobConfig
from nanomoe.logs import LogFormat, configure_logging
from nanomoe.processes import die_with_parent
from worker.memory import use_one_arena
from worker.protocol import (
    Assignment,
    CheckpointWritten,
    Done,
    Failure,
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
    from nanomoe.tokenizer import Tokenizer
    from nanomoe.training.run import Recorded, Run, Snapshot, Weights

log = logging.getLogger(__name__)


class Channel:
    """The pipe to the supervisor. Only messages are written to it: whatever else prints to stdout goes to the log."""

    def __init__(self) -> None:
        self._pipe = os.dup(1)
        os.dup2(2, 1)
        self._mutex = threading.Lock()
        self.assignment: Assignment | None = None
        """The attempt that messages are about."""

    def send(self, message: FromTrainer) -> None:
        """Write one message as one line. Thread-safe."""
        line = encode_from_trainer(message, self.assignment)
        with self._mutex:
            while line:
                line = line[os.write(self._pipe, line) :]


class TrainingControl:
    """Tells the training loop between two steps whether to stop, and whether a snapshot is due."""

    def __init__(self, supervision: Supervision, snapshot_seconds: float) -> None:
        self._supervision = supervision
        self._snapshot_seconds = snapshot_seconds
        self._last = time.monotonic()

    def stop(self) -> StopReason | None:
        return self._supervision.stop

    def snapshot_due(self) -> bool:
        if time.monotonic() - self._last < self._snapshot_seconds:
            return False
        self._last = time.monotonic()
        return True


class Writer:
    """Writes checkpoints and snapshots in a thread, in their order, and reports each once it is complete on the disk.

    Training goes on meanwhile: what was yielded is bytes, which nothing changes any more. At most one folder waits, so
    that a slow disk slows training and does not fill the memory.
    """

    def __init__(self, channel: Channel, folder: Path, fence: int) -> None:
        self._channel, self._folder, self._fence = channel, folder, fence
        self._last_snapshot: int | None = None
        self._waiting: Queue[Recorded | Snapshot | None] = Queue(maxsize=1)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="writer")
        self._thread.start()

    def write(self, what: "Recorded | Snapshot") -> None:
        """Raises what writing an earlier folder raised."""
        self._waiting.put(what)
        self._raise_if_failed()

    def close(self) -> None:
        """Wait until everything is on the disk. Raises what writing raised."""
        self._waiting.put(None)
        self._thread.join()
        self._raise_if_failed()

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


def run_job(start: Start, channel: Channel, supervision: Supervision) -> Done:
    """Train the job to its end, to a stop, or to a failure that has a name.

    Any other exception is a bug or a broken machine: the process ends without a `Done` message, which counts as a
    crash.
    """
    writer = Writer(channel, Path(start.folder), start.fence)
    try:
        try:
            outcome = _train(start, channel, supervision, writer)
        finally:
            writer.close()
    except Exception as error:
        failure = _explain(error)
        if failure is None:
            raise
        return Done(outcome="failed", error=failure)
    return Done(outcome=outcome)


def _train(start: Start, channel: Channel, supervision: Supervision, writer: Writer) -> Literal["succeeded", "stopped"]:
    from nanomoe.training import loop

    run = _prepare(start, channel)
    for happened in loop.train(run, TrainingControl(supervision, start.snapshot_seconds)):
        match happened:
            case loop.Steps():
                channel.send(Steps(**asdict(happened)))
            case loop.Warned():
                channel.send(Warned(**asdict(happened)))
            case loop.Stopped():
                return "stopped"
            case _:
                writer.write(happened)
    return "succeeded"


def _prepare(start: Start, channel: Channel) -> "Run":
    """Everything from the start message to a model that can train, on its device."""
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
    )
    run = prepared.run
    channel.send(
        Prepared(
            execution=prepared.execution.model_dump(mode="json"),
            n_tokens=prepared.n_tokens,
            total_steps=run.plan.total_steps,
            n_params=n_params(start.config, tokenizer.vocab_size),
            n_active_params=n_active_params(start.config, tokenizer.vocab_size),
            resumed_at_step=run.progress.step if resume is not None else None,
            warnings=prepared.warnings,
        )
    )
    return run


def _read_origin(start: Start, text: str) -> "tuple[Tokenizer, Weights | None, dict[str, bytes] | None]":
    """The tokenizer, the parent's weights and the snapshot's files, every byte verified.

    The tokenizer is that of the snapshot or checkpoint that training starts from, where there is one: the config's name
    may stand for another tokenizer by now.

    Raises:
        ParentUnusable: a file of the parent is missing or damaged.
        CheckpointDamaged: a file of the snapshot, or of the checkpoint that holds the tokenizer, is.
        TokenizerError: the config's tokenizer cannot be loaded or trained.
    """
    from nanomoe import checkpoint
    from nanomoe.lineage import ParentUnusable
    from nanomoe.tokenizer import Tokenizer, load_tokenizer

    if start.resume is not None:
        files = checkpoint.open(Path(start.resume.folder), start.resume.manifest_sha256).read_all()
        return Tokenizer.of_files(files), None, files
    if start.parent is not None:
        assert start.config.init_from is not None, "a parent is named in init_from"
        try:
            parent = checkpoint.open(Path(start.parent.folder), start.parent.manifest_sha256)
            return parent.tokenizer(), parent.weights(), None
        except checkpoint.CheckpointDamaged as error:
            raise ParentUnusable(start.config.init_from, error) from error
    if start.tokenizer is not None:
        earlier = checkpoint.open(Path(start.tokenizer.folder), start.tokenizer.manifest_sha256)
        return earlier.tokenizer(), None, None
    folders = () if start.tokenizer_dir is None else (Path(start.tokenizer_dir),)
    tokenizer = load_tokenizer(start.config.tokenizer, text=text, allow_hub=start.allow_hub, allowed_folders=folders)
    return tokenizer, None, None


def _explain(error: Exception) -> Failure | None:
    """Why the job failed: an error that follows from the job itself, or an error of the disk; None for any other
    exception."""
    from nanomoe import checkpoint
    from nanomoe.errors import NanomoeError
    from nanomoe.plan import OutOfMemory
    from nanomoe.training.memory import is_out_of_memory

    if isinstance(error, NanomoeError):
        return Failure(code=error.code, message=str(error))
    if is_out_of_memory(error):
        return Failure(code=OutOfMemory.code, message=str(error))
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
    _warm_up()
    train_jobs(channel, supervision)
    sys.stderr.flush()
    if supervision.should_exit:
        # Die by SIGTERM, so that the supervisor counts no crash for a job that was just sent.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    # Exit without cleanup: tearing down torch takes longer than a short job.
    os._exit(0)


def train_jobs(channel: Channel, supervision: Supervision) -> None:
    """Train job after job, until one fails or leaves something behind, or someone asks the process to exit."""
    from worker.process_state import ProcessState

    new_state = ProcessState()
    channel.send(Ready())
    while (assigned := supervision.wait_for_start()) is not None:
        start, lock = assigned
        new_state.restore()
        channel.assignment = start.assignment
        done = run_job(start, channel, supervision)
        channel.send(done)
        if done.outcome == "failed" or supervision.should_exit:
            return
        if (left := new_state.what_is_left()) is not None:
            log.warning("trainer_exits: %s", left)
            return
        # Closed, never unlocked: a child of the job that still lives keeps the slot locked.
        os.close(lock)
        channel.send(Idle())


def _warm_up() -> None:
    """Import what a job needs, train a toy to its end, and a step at the default size: much of torch is loaded, and its
    kernels are chosen, by the first step of a kind only. Touches no GPU."""
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
    # What is there now stays: to search it after every job for what is unreachable took 0.15 s (measured).
    gc.collect()
    gc.freeze()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m worker.trainer", description="Started by a worker.")
    parser.add_argument("--parent", type=int, required=True, help="process id of the supervisor")
    parser.add_argument(
        "--until",
        type=float,
        required=True,
        help="monotonic time to exit at without a later keep-alive",
    )
    parser.add_argument("--log-format", choices=get_args(LogFormat), default="console")
    return parser


if __name__ == "__main__":
    main()
