"""The child process that trains one job: it reads the job from stdin and reports on stdout, one message a line.

Knows no database: all its input comes from its supervisor, and it exits when the supervisor is gone. It is started
before there is a job, imports torch, touches no GPU and waits. One process, one job.
"""

import argparse
import faulthandler
import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Literal, NoReturn, get_args

from nanomoe.config import ConfigWarning, JobConfig
from nanomoe.logs import LogFormat, configure_logging
from nanomoe.processes import die_with_parent
from worker.protocol import (
    CheckpointWritten,
    Done,
    Failure,
    FromTrainer,
    Prepared,
    Ready,
    SnapshotWritten,
    Start,
    Steps,
    StopReason,
    Warned,
    encode,
)
from worker.supervision import Supervision

if TYPE_CHECKING:
    from nanomoe.tokenizer import Tokenizer
    from nanomoe.training.execution import Execution
    from nanomoe.training.run import Recorded, Run, Snapshot


class Channel:
    """The pipe to the supervisor. Only messages are written to it: whatever else prints to stdout goes to the log."""

    def __init__(self) -> None:
        self._pipe = os.dup(1)
        os.dup2(2, 1)
        self._mutex = threading.Lock()

    def send(self, message: FromTrainer) -> None:
        """Write one message as one line. Thread-safe."""
        line = encode(message)
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
                    percent=what.percent,
                    step=what.step,
                    epoch=what.epoch,
                    folder=name,
                    manifest_sha256=sha256,
                    files=manifest.files,
                    metrics={**what.metrics, "tok_per_sec": what.tok_per_sec},
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
    from nanomoe import checkpoint
    from nanomoe.config_warnings import config_warnings
    from nanomoe.model.size import n_active_params, n_params
    from nanomoe.model.upcycle import starting_weights
    from nanomoe.training.execution import Execution, find_device
    from nanomoe.training.run import Run

    config = start.config
    text = Path(start.text_path).read_bytes().decode()
    tokenizer = _tokenizer(start, text)
    tokens = tokenizer.encode(text)
    execution = Execution.decide(config, start.device, n_tokens=len(tokens))
    differences: list[str] = []
    if start.execution is not None:
        # A job that began before the micro-batch was part of it had the config's.
        first = Execution.model_validate({"micro_batch": config.batch_size} | start.execution)
        execution = _keep(first, execution)
        differences = first.differences(execution)
    execution.apply()
    resume, parent = None, None
    if start.resume is not None:
        resume = checkpoint.read_all(Path(start.resume.folder), start.resume.manifest_sha256)
    elif start.parent is not None:
        parent = starting_weights(checkpoint.load_weights(Path(start.parent.folder)), config, seed=config.seed)
    device = find_device(start.device)
    run = Run(config, tokens, tokenizer, execution, device=device, parent=parent, resume=resume)
    warnings = config_warnings(config, run.plan, n_bytes=len(text.encode()), vocab_size=tokenizer.vocab_size)
    if differences:
        otherwise = f"this attempt computes otherwise than the first one did: {'; '.join(differences)}"
        warnings.append(ConfigWarning(code="resume_not_exact", message=otherwise))
    channel.send(
        Prepared(
            execution=execution.model_dump(mode="json"),
            n_tokens=len(tokens),
            total_steps=run.plan.total_steps,
            n_params=n_params(config, tokenizer.vocab_size),
            n_active_params=n_active_params(config, tokenizer.vocab_size),
            resumed_at_step=run.progress.step if resume is not None else None,
            warnings=warnings,
        )
    )
    return run


def _keep(first: "Execution", now: "Execution") -> "Execution":
    """The execution of the job's first start, as far as this machine supports it."""
    if first.device != now.device:
        return now.model_copy(update={"micro_batch": first.micro_batch})
    choices = ("precision", "n_threads", "path", "expert_path", "expert_path_reason", "deterministic", "micro_batch")
    return now.model_copy(update={name: getattr(first, name) for name in choices})


def _tokenizer(start: Start, text: str) -> "Tokenizer":
    """The tokenizer of the snapshot or checkpoint that training starts from, where there is one: the config's name may
    stand for another tokenizer by now."""
    from nanomoe import checkpoint
    from nanomoe.tokenizer import load_tokenizer

    if (origin := start.resume or start.parent or start.tokenizer) is not None:
        return checkpoint.read_tokenizer(Path(origin.folder), origin.manifest_sha256)
    folders = () if start.tokenizer_dir is None else (Path(start.tokenizer_dir),)
    return load_tokenizer(start.config.tokenizer, text=text, allow_hub=start.allow_hub, allowed_folders=folders)


def _explain(error: Exception) -> Failure | None:
    """Why the job failed: a deterministic error of the job, or an error of the disk; None for any other exception."""
    import torch

    from nanomoe import checkpoint

    if checkpoint.is_disk_full(error):
        return Failure(code="disk_full", message=f"the disk is full: {error}")
    if isinstance(error, OSError) and not hasattr(error, "code"):
        return Failure(code="storage_failed", message=f"a file could not be read or written: {error!r}")
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        return Failure(code="out_of_memory", message=str(error))
    code = getattr(error, "code", None)
    return Failure(code=code, message=str(error)) if isinstance(code, str) else None


def main() -> NoReturn:
    """Warm up, wait for the start message, train one job, send `Done`."""
    options = _parser().parse_args()
    die_with_parent(options.parent)
    configure_logging(options.log_format)
    channel = Channel()
    supervision = Supervision(options.until)
    faulthandler.enable()
    # The message holds the request; the signal only interrupts a system call of the main thread.
    signal.signal(signal.SIGTERM, lambda *_: supervision.terminated())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _warm_up()
    channel.send(Ready())
    channel.send(run_job(supervision.wait_for_start(), channel, supervision))
    # Nothing is left to do, and tearing down torch takes longer than many a job.
    sys.stderr.flush()
    os._exit(0)


def _warm_up() -> None:
    """Import what a job needs, train a toy to its end, and a step at the default size: much of torch is loaded, and its
    kernels are chosen, by the first step of a kind only. Touches no GPU."""
    import torch

    import nanomoe.model.upcycle  # noqa: F401
    from nanomoe.tokenizer import BUNDLED, load_tokenizer
    from nanomoe.training.execution import Execution
    from nanomoe.training.loop import train
    from nanomoe.training.run import Run

    def run_of(config: JobConfig, text: str) -> Run:
        tokenizer = load_tokenizer(config.tokenizer)
        tokens = tokenizer.encode(text)
        execution = Execution.decide(config, "cpu", n_tokens=len(tokens))
        return Run(config, tokens, tokenizer, execution, device=torch.device("cpu"))

    toy = JobConfig(tokenizer="bytes", block_size=4, n_layer=2, n_head=1, n_embd=4, use_moe=True, epochs=1)
    for _ in train(run_of(toy, "warm up")):
        pass
    run_of(JobConfig(tokenizer=BUNDLED), "Era uma vez " * 30).train_step()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m worker.trainer", description="Started by a worker for one job.")
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
