"""Live display of a training run from its events: progress bar and rows in a terminal, plain lines elsewhere, or JSON.

Knows no connection: `follow` feeds it from the service, `nanomoe train` from the training loop itself.
"""

from types import TracebackType
from typing import Any, Protocol, Self

from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from service.cli import checkpoint_text, job_text, text
from service.cli.output import to_json
from service.client import JobHandle, Unavailable, Unreachable
from service.http import schemas
from service.jobs.statuses import TERMINAL


class Display(Protocol):
    """Receiver of a run's events."""

    def status(self, event: schemas.StatusEvent) -> None: ...

    def waiting(self, job: schemas.JobView) -> None: ...

    def progress(self, progress: schemas.Progress) -> None: ...

    def quarter(self, checkpoint: schemas.CheckpointMetrics) -> None: ...

    def warning(self, code: str, message: str) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


QUEUE_POLL_SECONDS = 2.0
"""Time between two updates of a waiting job's queue position."""


def follow(job: JobHandle, display: Display) -> schemas.JobView:
    """Show the job's events until it has ended, and return the ended job."""
    shown: set[int] = set()

    def show(event: Any) -> None:
        match event.data:
            case schemas.StatusEvent():
                display.status(event.data)
                if event.data.status == "queued":
                    _show_queue_position(job, display)
            case schemas.CheckpointMetrics(percent=percent) if percent not in shown:
                shown.add(percent)
                display.quarter(event.data)
            case schemas.Progress():
                display.progress(event.data)
            case _ if event.kind == "warning":
                display.warning(event.data.code, event.data.message)

    job.wait(on_event=show)
    # Of a job that had ended before, the service sends no events: its quarters are asked for.
    for checkpoint in job.metrics(points=8).checkpoints:
        if checkpoint.percent not in shown:
            display.quarter(checkpoint)
    return job.view


def _show_queue_position(job: JobHandle, display: Display) -> None:
    """Show the job's queue position until it is not queued any more."""
    try:
        job.refresh()
        while job.view.status == "queued":
            display.waiting(job.view)
            job.refresh(wait=QUEUE_POLL_SECONDS, seen="queued")
    except (Unreachable, Unavailable):
        return  # the event stream, which is open meanwhile, retries for longer and reports the failure


class JsonDisplay:
    """One JSON object a line: `{"event": "checkpoint", "data": {...}}`."""

    def waiting(self, job: schemas.JobView) -> None:
        """Print nothing: a queue position is no event."""

    def status(self, event: schemas.StatusEvent) -> None:
        self._line("status", event)

    def progress(self, progress: schemas.Progress) -> None:
        self._line("step", progress)

    def quarter(self, checkpoint: schemas.CheckpointMetrics) -> None:
        self._line("checkpoint", checkpoint)

    def warning(self, code: str, message: str) -> None:
        print(to_json({"event": "warning", "data": {"code": code, "message": message}}), flush=True)

    def _line(self, event: str, data: BaseModel) -> None:
        print(to_json({"event": event, "data": data}), flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class TextDisplay:
    """A row for each quarter as it is recorded; in a terminal, with a progress bar below that is removed at the end."""

    def __init__(self, console: Console, *, introduced: schemas.JobView | None = None, n_lines: int = 1) -> None:
        """`introduced`: the job as it was shown before, whose queue position and warnings are not repeated; None for a
        run without a service. `n_lines`: most lines of a quarter's reconstruction and of its continuation."""
        self._console = console
        self._n_lines = n_lines
        self._is_from_parent = introduced is not None and introduced.parent is not None
        self._warned = set() if introduced is None else {(one.code, one.message) for one in introduced.warnings}
        self._shown_position = None if introduced is None else _position(introduced)
        self._header_shown = False
        self._bar = Progress(
            TextColumn("{task.description}", style="cyan"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            expand=True,
        )
        self._task = self._bar.add_task("waiting", total=None, detail="")

    def status(self, event: schemas.StatusEvent) -> None:
        self._bar.update(self._task, description=event.status, detail="")
        reason = f" ({text.visible(event.status_reason)})" if event.status_reason else ""
        if event.status not in TERMINAL and (reason or not self._console.is_terminal):
            self._console.print(f"{event.status}{reason}")

    def waiting(self, job: schemas.JobView) -> None:
        """Show the queue position: in a terminal in the bar; elsewhere as a line whenever it changes."""
        self._bar.update(self._task, description="queued", detail=job_text.queue_text(job))
        previous, self._shown_position = self._shown_position, _position(job)
        if previous != self._shown_position and not self._console.is_terminal:
            self._console.print(job_text.status_line(job))

    def progress(self, progress: schemas.Progress) -> None:
        detail = f"{progress.step:,}/{text.number(progress.total_steps)}"
        if progress.tok_per_sec is not None:
            detail += f" {progress.tok_per_sec:>8,.0f} tok/s"
        self._bar.update(
            self._task,
            description="running",
            total=progress.total_steps,
            completed=progress.step,
            detail=detail,
        )

    def quarter(self, checkpoint: schemas.CheckpointMetrics) -> None:
        if not self._header_shown:
            self._console.print(checkpoint_text.quarter_header())
            self._header_shown = True
        self._console.print(checkpoint_text.quarter_row(checkpoint))
        for line in checkpoint_text.quarter_texts(checkpoint, self._console, self._n_lines):
            self._console.print(line)
        if checkpoint.percent == 0 and checkpoint.reconstruction is not None and not self._is_from_parent:
            self._console.print(checkpoint_text.untrained_note(self._console))
        if checkpoint.stopped_early:
            self._console.print(checkpoint_text.stopped_early_line(checkpoint))

    def warning(self, code: str, message: str) -> None:
        if (code, message) not in self._warned:
            self._warned.add((code, message))
            self._console.print(job_text.warning_line(code, message, self._console))

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def _position(job: schemas.JobView) -> tuple[int | None, bool]:
    """The part of a queue position that is printed again when it changes: not the seconds of an estimate."""
    return job.queue_position, job.estimated_start_at is not None
