"""Live display of a sweep from its events: a line for each job that ends, in a terminal a bar over all, or JSON."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from service.cli import job_text, text
from service.cli.output import to_json
from service.client import JobEvent, SweepHandle
from service.http import schemas
from service.jobs.statuses import TERMINAL

SUCCEEDED, FAILED = 0, 1
"""Exit codes."""


def follow_sweep(sweep: SweepHandle, *, as_json: bool) -> int:
    """Show a sweep's events until all of its jobs have ended; returns the exit code."""
    if as_json:
        sweep.wait(on_event=lambda event: print(to_json({"event": event.kind, "data": event.data}), flush=True))
        print(to_json({"event": "sweep", "data": sweep.view}))
    else:
        with SweepDisplay(sweep, text.console()) as display:
            sweep.wait(on_event=display.show)
    return SUCCEEDED if sweep.view.status == "succeeded" else FAILED


class SweepDisplay:
    """Lines for the jobs that end, and a bar below that is removed at the end."""

    def __init__(self, sweep: SweepHandle, console: Console) -> None:
        self._console = console
        ids = sweep.view.job_ids or []
        self._numbers = {job_id: number for number, job_id in enumerate(ids, start=1)}
        self._percents = dict.fromkeys(ids, 0.0)
        self._losses: dict[str, float] = {}
        self._ended = 0
        self._bar = Progress(
            TextColumn("{task.description}", style="cyan"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            expand=True,
        )
        self._task = self._bar.add_task("waiting", total=100.0 * len(ids))

    def show(self, event: JobEvent) -> None:
        """Show one event."""
        job_id = event.data.job_id
        match event.data:
            case schemas.JobStatusEvent(status=status):
                if status in TERMINAL:
                    self._end(job_id, event.data)
            case schemas.JobCheckpointEvent():
                self._losses[job_id] = event.data.loss
                self._percents[job_id] = float(event.data.percent)
        self._bar.update(
            self._task,
            description=f"{self._ended:,} of {len(self._percents):,} jobs have ended",
            completed=sum(self._percents.values()),
        )

    def _end(self, job_id: str, event: schemas.JobStatusEvent) -> None:
        self._ended += 1
        self._percents[job_id] = 100.0
        line = Text.assemble(f"{self._numbers.get(job_id, 0):>4}  {job_id}  ", job_text.status_text(event.status))
        if job_id in self._losses:
            line.append(f"  loss {text.figure(self._losses[job_id])}")
        if event.error is not None:
            line.append(f"  {event.error.code}: {text.visible(event.error.message)}")
        self._console.print(line, soft_wrap=True)

    def __enter__(self) -> "SweepDisplay":
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()
