"""Sweeps and comparisons as lines and tables of the terminal. Knows no connection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from service.cli import checkpoint_text, job_text, plot, text
from service.jobs.statuses import TERMINAL
from service.report.curve import curves_of
from service.report.labels import label_of, value_label

if TYPE_CHECKING:
    from service.http import schemas


def sweep_line(sweep: schemas.SweepView) -> Text:
    """A sweep on one line: `queued  width  6 jobs: n_embd 64, 128; seed 42 to 44`."""
    n_jobs = sum(sweep.counts.values())
    line = job_text.status_text(sweep.status)
    if sweep.name:
        line.append(f"  {text.visible(sweep.name)}", "default")
    varied = _varied(sweep)
    return line.append(f"  {n_jobs:,} {'job' if n_jobs == 1 else 'jobs'}{': ' if varied else ''}{varied}", "default")


def print_sweeps(sweeps: Sequence[schemas.SweepView]) -> None:
    """Print a row for each sweep, with its name and what varies."""
    table = text.new_table("sweep", "status", ">ended", ">jobs", ">submitted")
    for sweep in sweeps:
        n_ended = sum(sweep.counts.get(status, 0) for status in TERMINAL)
        submitted = text.ago(sweep.created_at).removesuffix(" ago")
        n_jobs = sum(sweep.counts.values())
        table.add_row(sweep.id, job_text.status_text(sweep.status), str(n_ended), str(n_jobs), submitted)
    text.print_table(table, ["  ".join(filter(None, [text.visible(one.name or ""), _varied(one)])) for one in sweeps])


def _varied(sweep: schemas.SweepView) -> str:
    return "; ".join(f"{one.name} {_values(one.values)}" for one in sweep.parameters)


def _values(values: Sequence[Any]) -> str:
    shown = [value_text(value) for value in values]
    return ", ".join(shown) if len(shown) <= 4 else f"{shown[0]}, {shown[1]}, ... {shown[-1]}"


def value_text(value: Any) -> str:
    """A knob's value; of a digest the beginning."""
    return text.visible(value_label(value))


_WIDEST = 10_000
"""Columns that no table needs."""


def print_comparison(found: schemas.Comparison) -> None:
    """Print the newest figures: of each group where a group has several jobs, else of each job; and the best."""
    if not found.jobs:
        text.console().print("no jobs")
        return
    table, left_out = _fitting_table(found, text.console())
    text.print_table(table)
    if left_out:
        note = f"no room for {', '.join(left_out)}: choose with --metric"
        text.console().print(Text(note, text.DIM))
    if found.best is not None:
        best = found.best
        line = f"best {best.metric}: {text.figure(best.value)}, job {best.job_id} at {best.percent} %"
        text.console().print(line, soft_wrap=True)


def _fitting_table(found: schemas.Comparison, console: Console) -> tuple[Table, list[str]]:
    """The table, and the metrics that a terminal has no room for; those that no job has are left out."""
    make = group_table if any(len(group.job_ids) > 1 for group in found.groups) else job_table
    measured = [quarter.metrics for job in found.jobs for quarter in job.quarters]
    have = {name for name in found.metrics if any(metrics.get(name) is not None for metrics in measured)}
    metrics = [name for name in found.metrics if name in have or not have]
    n = len(metrics)
    table = make(found.model_copy(update={"metrics": metrics}))
    unbounded = console.options.update(width=_WIDEST)
    while console.is_terminal and n > 1 and console.measure(table, options=unbounded).maximum > console.width:
        n -= 1
        table = make(found.model_copy(update={"metrics": metrics[:n]}))
    return table, metrics[n:]


def print_continuations(group: schemas.ComparedGroup, measured: schemas.Metrics) -> None:
    """Print what the first job of a group continued at each quarter."""
    console = text.console()
    console.print()
    console.print(Text(text.visible(label_of(group.values)), "bold"))
    for checkpoint in measured.checkpoints:
        console.print(checkpoint_text.continuation_line(checkpoint, console))


def print_curves(found: schemas.Comparison, series: Sequence[schemas.JobEnvelope]) -> None:
    """Draw the training curves of the compared jobs, seeds as one."""
    if found.jobs:
        console = text.console()
        console.print()
        console.print(plot.plot(curves_of(found, series), console))


def job_table(found: schemas.Comparison) -> Table:
    """A row for each job: what differs, and the figures of its newest checkpoint."""
    names = [one.name for one in found.parameters]
    table = text.new_table("job", "status", *(f">{name}" for name in (*names, "done", *found.metrics, *_extra(found))))
    for job in found.jobs:
        quarter = job.quarters[-1] if job.quarters else None
        table.add_row(
            job.job_id,
            job_text.status_text(job.status),
            *(value_text(job.values[name]) for name in names),
            "–" if quarter is None else f"{quarter.percent} %",
            *(text.figure(None if quarter is None else quarter.metrics.get(name)) for name in found.metrics),
            *_extra_cells(found, job),
        )
    return table


def _extra(found: schemas.Comparison) -> tuple[str, ...]:
    """Columns that only some comparisons have."""
    until = ("steps until", "seconds until") if any(job.steps_until is not None for job in found.jobs) else ()
    at = ("loss at step",) if any(job.at_step is not None for job in found.jobs) else ()
    return (*until, *at)


def _extra_cells(found: schemas.Comparison, job: schemas.ComparedJob) -> list[str]:
    cells = []
    if any(one.steps_until is not None for one in found.jobs):
        until = job.steps_until
        cells += ["–", "–"] if until is None else [f"{until.step:,}", text.figure(until.seconds)]
    if any(one.at_step is not None for one in found.jobs):
        cells.append(text.figure(None if job.at_step is None else job.at_step.train_loss))
    return cells


def group_table(found: schemas.Comparison) -> Table:
    """A row for each group of jobs that differ only in the seed: mean and standard deviation of the newest figures."""
    names = [one.name for one in found.parameters if one.name != "seed"]
    until = ("steps until", "seconds until") if any(group.steps_until is not None for group in found.groups) else ()
    at = ("loss at step",) if any(group.at_step is not None for group in found.groups) else ()
    table = text.new_table(*(f">{name}" for name in (*names, "jobs", "done", *found.metrics, *until, *at)))
    for group in found.groups:
        quarter = group.quarters[-1] if group.quarters else None
        cells = [spread_text(None if quarter is None else quarter.metrics.get(name)) for name in found.metrics]
        cells += [spread_text(group.steps_until), spread_text(group.seconds_until)][: len(until)]
        cells += [spread_text(None if group.at_step is None else group.at_step["train_loss"])][: len(at)]
        table.add_row(
            *(value_text(group.values[name]) for name in names),
            str(len(group.job_ids)),
            "–" if quarter is None else f"{quarter.percent} %",
            *cells,
        )
    return table


def spread_text(spread: schemas.Spread | None) -> str:
    """Mean and standard deviation: `0.396 ± 0.012`."""
    if spread is None:
        return "–"
    return f"{spread.mean:.4g}" if spread.std is None else f"{spread.mean:.4g} ± {spread.std:.2g}"
