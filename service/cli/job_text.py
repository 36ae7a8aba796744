"""Jobs and workers as lines and tables of the terminal. Knows no connection."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from json import dumps
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from service.cli import text

if TYPE_CHECKING:
    from nanomoe.config import JobConfig
    from service.http import schemas

STATUS_STYLES: dict[str, str] = {
    "queued": "yellow",
    "running": "cyan",
    "paused": "yellow",
    "succeeded": text.GOOD,
    "failed": text.WRONG,
    "cancelled": "magenta",
}


def job_line(job: schemas.JobView) -> Text:
    """A job on one line: `0192… succeeded  my run`."""
    line = Text.assemble(job.id, "  ", status_line(job))
    if job.name:
        line.append(f"  {text.visible(job.name)}")
    return line


def status_text(status: str) -> Text:
    """The status in its colour."""
    return Text(status, STATUS_STYLES.get(status, ""))


def status_line(job: schemas.JobView) -> Text:
    """The status, queue position and reason: `queued, 2 ahead (interrupted, ...)`."""
    line = status_text(job.status)
    if place := queue_text(job):
        line.append(f", {place}", "default")
    if job.status_reason:
        line.append(f" ({text.visible(job.status_reason)})", text.DIM)
    return line


def queue_text(job: schemas.JobView) -> str:
    """The queue position and the estimated start: `next, may start in about 20 s`.

    Empty where a worker is free for the job, where its position is unknown, and unless it is queued.
    """
    if job.status != "queued" or job.queue_position is None:
        return ""
    ahead = f"{job.queue_position:,} ahead" if job.queue_position else "next"
    if job.estimated_start_at is None:
        return ahead
    seconds = round((job.estimated_start_at - datetime.now(UTC)).total_seconds())
    if seconds < 1:
        return "" if job.queue_position == 0 else ahead
    return f"{ahead}, may start in about {f'{seconds} s' if seconds < 60 else text.duration(seconds)}"


def size_line(config: JobConfig, model: schemas.ModelSize, n_tokens: int | None, steps: int | None) -> Text:
    """The size of a job: `4 layers of 128 channels, 1.8 M parameters; 76 tokens, 500 steps`."""
    kind = f"{config.n_experts} experts, {config.k} per token, " if config.use_moe else ""
    parts = [f"{config.n_layer} layers of {config.n_embd} channels, {kind}{text.millions(model.n_params)} parameters"]
    if model.n_active_params is not None and model.n_active_params != model.n_params:
        parts[0] += f" ({text.millions(model.n_active_params)} active)"
    if n_tokens is not None:
        parts.append(f"{n_tokens:,} tokens" + (f", {steps:,} steps" if steps is not None else ""))
    return Text("; ".join(parts), text.DIM)


def ending(job: schemas.JobView) -> Text:
    """The status, duration and reason or error of an ended job."""
    took = ""
    if job.started_at is not None and job.finished_at is not None:
        took = f" in {text.duration((job.finished_at - job.started_at).total_seconds())}"
    line = status_text(job.status).append(took, "default")
    if job.status_reason:
        line.append(f", {text.visible(job.status_reason)}", "default")
    if job.error is not None:
        line.append(f": {job.error.code}: {text.visible(job.error.message)}", "default")
    return line


def warning_line(code: str, message: str, console: Console) -> Text:
    """A warning, wrapped at the terminal's width; in a pipe on one line."""
    return text.hanging(Text.assemble(("warning ", "yellow"), f"{code}: {text.visible(message)}"), console)


def print_jobs(jobs: Sequence[schemas.JobView]) -> None:
    """Print one row for each job, with its name, the knobs that differ from the defaults, its queue position, or why it
    waits or ended early."""
    text.print_table(jobs_table(jobs), [_note(job) for job in jobs])


def _note(job: schemas.JobView) -> str:
    place = ", ".join(filter(None, [queue_text(job), text.visible(job.status_reason or "")]))
    return "  ".join(filter(None, [text.visible(job.name or ""), changed_knobs(job.config), place]))


def changed_knobs(config: JobConfig) -> str:
    """The knobs that differ from the reference run's, as they are set: `lr=0.005 n_embd=64`."""
    given, defaults = config.model_dump(mode="json"), type(config)().model_dump(mode="json")
    changed = {name: value for name, value in given.items() if value != defaults[name]}
    if config.init_from is not None:
        changed["init_from"] = f"{config.init_from.job_id}@{config.init_from.checkpoint}"
    return " ".join(f"{name}={value if isinstance(value, str) else dumps(value)}" for name, value in changed.items())


def jobs_table(jobs: Iterable[schemas.JobView]) -> Table:
    """A table of jobs."""
    table = text.new_table("job", "status", ">done", ">loss", ">ppl", ">submitted")
    for job in jobs:
        table.add_row(
            job.id,
            status_text(job.status),
            f"{job.progress.percent:.0f} %",
            text.number(None if job.figures is None else job.figures.loss, 4),
            text.figure(None if job.figures is None else job.figures.perplexity),
            text.ago(job.created_at).removesuffix(" ago"),
        )
    return table


def workers_table(workers: Iterable[schemas.WorkerView]) -> Table:
    """A table of workers."""
    table = text.new_table("worker", "host", "device", ">jobs", ">busy", ">slots", ">last seen")
    for worker in workers:
        devices = ", ".join(" ".join(filter(None, (one.device, one.name))) for one in worker.devices)
        table.add_row(
            text.visible(worker.name),
            text.visible(worker.host),
            text.visible(devices),
            str(len(worker.current_jobs)),
            str(worker.busy_slots),
            str(worker.slots),
            "stopped" if worker.stopped_at is not None else text.ago(worker.last_seen_at),
        )
    return table
