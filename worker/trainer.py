"""The child process that trains one job: it reads the job from stdin and says on stdout what happened, line by line.

Knows no database: everything it is told comes from its supervisor, and without a supervisor it does not live on. It is
started before there is a job, imports torch, touches no GPU and waits. One process, one job.
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
from typing import TYPE_CHECKING, Literal, NoReturn

from nanomoe.config import ConfigWarning, JobConfig
from worker.guard import Supervision, die_with_parent
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

if TYPE_CHECKING:
    from nanomoe.tokenizer import Tokenizer
    from nanomoe.training.execution import Execution
    from nanomoe.training.run import Recorded, Run, Snapshot


class Wire:
    """The way back to the supervisor. Nobody else can write to it: stdout itself goes to the log."""

    def __init__(self) -> None:
        self._pipe = os.dup(1)
        os.dup2(2, 1)
        self._one_at_a_time = threading.Lock()

    def say(self, message: FromTrainer) -> None:
        """Send one line, whole."""
        line = encode(message)
        with self._one_at_a_time:
            while line:
                line = line[os.write(self._pipe, line) :]


class Wishes:
    """What the training loop asks between two steps."""

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
    """Writes checkpoints and snapshots in a thread, in their order, and says so when each is whole on the disk.

    Training goes on meanwhile: what was yielded is bytes, which nothing changes any more. At most one folder waits, so
    that a slow disk slows training and does not fill the memory.
    """

    def __init__(self, wire: Wire, folder: Path, fence: int) -> None:
        self._wire, self._folder, self._fence = wire, folder, fence
        self._last_snapshot: int | None = None
        self._waiting: Queue[Recorded | Snapshot | None] = Queue(maxsize=1)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="writer")
        self._thread.start()

    def write(self, what: "Recorded | Snapshot") -> None:
        """Raises what writing an earlier folder raised."""
        self._waiting.put(what)
        self._complain()

    def close(self) -> None:
        """Wait until everything is on the disk. Raises what writing raised."""
        self._waiting.put(None)
        self._thread.join()
        self._complain()

    def _complain(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (what := self._waiting.get()) is not None:
            if self._error is None:
                try:
                    self._commit(what)
                except Exception as error:  # raised again where the training loop can end of it
                    self._error = error

    def _commit(self, what: "Recorded | Snapshot") -> None:
        from nanomoe import checkpoint
        from nanomoe.training.run import Recorded

        if isinstance(what, Recorded):
            name = checkpoint.folder_name(self._fence, what.percent)
            manifest, sha256 = checkpoint.write(self._folder / name, what.files)
            self._wire.say(
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
            self._wire.say(SnapshotWritten(step=what.step, folder=name, manifest_sha256=sha256))


def run_job(start: Start, wire: Wire, supervision: Supervision) -> Done:
    """Train the job to its end, to a stop, or to a failure that has a name.

    Any other exception is a bug or a broken machine: the process ends without a last word, which counts as a crash.
    """
    writer = Writer(wire, Path(start.folder), start.fence)
    try:
        try:
            outcome = _train(start, wire, supervision, writer)
        finally:
            writer.close()
    except Exception as error:
        failure = _explain(error)
        if failure is None:
            raise
        return Done(outcome="failed", error=failure)
    return Done(outcome=outcome)


def _train(start: Start, wire: Wire, supervision: Supervision, writer: Writer) -> Literal["succeeded", "stopped"]:
    from nanomoe.training import loop

    run = _prepare(start, wire)
    for happened in loop.train(run, Wishes(supervision, start.snapshot_seconds)):
        match happened:
            case loop.Steps():
                wire.say(Steps(**asdict(happened)))
            case loop.Warned():
                wire.say(Warned(**asdict(happened)))
            case loop.Stopped():
                return "stopped"
            case _:
                writer.write(happened)
    return "succeeded"


def _prepare(start: Start, wire: Wire) -> "Run":
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
    is_first = start.execution is None
    execution = Execution.decide(
        config, start.device, n_tokens=len(tokens), vocab_size=tokenizer.vocab_size if is_first else None
    )
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
    wire.say(
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
    """What was decided at the job's first start, as far as this machine can do it too: where its loops are not compiled
    yet, a fused step is done operator by operator until the next attempt."""
    if first.device != now.device:
        return now.model_copy(update={"micro_batch": first.micro_batch})
    choices = ["precision", "n_threads", "expert_path", "expert_path_reason", "deterministic", "micro_batch"]
    if first.path == "eager":
        choices += ["path", "path_reason", "compiled_for"]
    return now.model_copy(update={name: getattr(first, name) for name in choices})


def _tokenizer(start: Start, text: str) -> "Tokenizer":
    """That of the weights or of the attempt that we go on from, where there is one: a name may mean something else by
    now."""
    from nanomoe import checkpoint
    from nanomoe.tokenizer import load_tokenizer

    if (origin := start.resume or start.parent or start.tokenizer) is not None:
        return checkpoint.read_tokenizer(Path(origin.folder), origin.manifest_sha256)
    folders = () if start.tokenizer_dir is None else (Path(start.tokenizer_dir),)
    return load_tokenizer(start.config.tokenizer, text=text, allow_hub=start.allow_hub, allowed_folders=folders)


def _explain(error: Exception) -> Failure | None:
    """What the job failed of: an error that comes again whoever tries, or of the disk, which is not the job's doing;
    None for any other."""
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
    """One process, one job: warm up, wait for the start, train, say the last word."""
    options = _parser().parse_args()
    die_with_parent(options.parent)
    wire = Wire()
    supervision = Supervision(options.until)
    faulthandler.enable()
    # The message tells what to do; the signal only wakes the main thread from a system call.
    signal.signal(signal.SIGTERM, lambda *_: supervision.terminated())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _warm_up()
    wire.say(Ready())
    wire.say(run_job(supervision.wait_for_start(), wire, supervision))
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
    parser.add_argument("--until", type=float, required=True, help="monotonic time to end at if nothing is heard")
    return parser


if __name__ == "__main__":
    main()
