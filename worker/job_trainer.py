"""One job in the trainer's process: from its start message to a run that can train, its end, and what is written of it.

Knows no database. `worker.trainer` is the process, `worker.cohort_trainer` trains several jobs together.
"""

import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Literal

from nanomoe.store.opening import open_store
from nanomoe.store.store import Store, StoreError
from worker.channel import JobChannel
from worker.compiler import STEP_PATH_VARIABLE
from worker.protocol import (
    CheckpointWritten,
    Done,
    Failure,
    Folder,
    Prepared,
    SnapshotWritten,
    Start,
    Steps,
    StopReason,
    Warned,
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
        return failed_end(error)
    return Done(outcome=outcome)


def _train(
    start: Start, channel: JobChannel, supervision: Supervision, writer: Writer, kept_steps: "KeptSteps"
) -> Outcome:
    from nanomoe.training import loop

    run = prepare_run(start, channel, kept_steps)
    outcome: Outcome = "succeeded"
    for happened in loop.train(run, TrainingControl(supervision, start)):
        if isinstance(happened, loop.Stopped):
            outcome = "stopped"
        else:
            report(happened, channel, writer)
    run.keep_step()
    return outcome


def report(happened: "Happened", channel: JobChannel, writer: Writer) -> None:
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


def failed_end(error: Exception) -> Done:
    """The end of a job that failed. Raises the error again where it has no name."""
    failure = _explain(error)
    if failure is None:
        raise error
    return Done(outcome="failed", error=failure)


def prepare_run(
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
