"""The commands about many jobs at once: `sweep`, `sweeps`, `compare`, `presets`, `run`."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.text import Text

from nanomoe.config import JobConfig, SampleConfig
from service.cli import comparison_text, text
from service.cli.addresses import option_for
from service.cli.jobs import INTERRUPTED, read_text, tags_of
from service.cli.knobs import given_config, grid_of
from service.cli.options import A_JOB, ConfigFile, Set, Sweep, Url, connect
from service.cli.output import Json, print_json
from service.cli.references import Reference, sweep_id_or_name
from service.cli.sweep_display import follow_sweep
from service.cli.usage_error import UsageError
from service.client import Client, SweepHandle, calls
from service.http import schemas

Language = Annotated[
    Literal["en", "pt"] | None, typer.Option("--lang", help="Language of the explanations; by default the terminal's.")
]


def sweep(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The training text in UTF-8; - is standard input.")],
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid", "-g", metavar="KNOB=VALUE,VALUE", help="Values of a knob; several knobs give every combination."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Jobs for each combination, with different seeds.")] = 1,
    set_: Set = None,
    config: ConfigFile = None,
    name: Annotated[str | None, typer.Option(help="Name of the sweep, after which its jobs are named.")] = None,
    tag: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A label of the sweep and its jobs; may be repeated.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print number, sizes and warnings of the jobs without submitting them.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Follow the jobs to their ends, and compare them.")
    ] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Train many models that differ in a few knobs."""
    base = given_config(config, set_ or [])
    varied = grid_of(JobConfig.model_fields, grid or []) or None
    given = read_text(file)
    with connect(url) as client:
        if dry_run:
            _show_estimate(client.estimate_sweep(given, base, grid=varied, seeds=seeds), as_json)
            return
        handle = client.sweep(given, base, grid=varied, seeds=seeds, name=name, tags=tags_of(tag or []))
        if watch:
            raise typer.Exit(_watch(handle, as_json=as_json))
    if as_json:
        print_json(handle.view)
    else:
        _introduce(handle)
        at = option_for(client.base_url)
        hint = f"compare its jobs: {text.program()} compare --sweep {handle.id}{at}"
        text.console().print(hint, soft_wrap=True)


def sweeps(
    limit: Annotated[int, typer.Option(help="Most sweeps to list.")] = 20, url: Url = None, as_json: Json = False
) -> None:
    """List the newest sweeps: how many of their jobs have ended, and what varies."""
    with connect(url) as client:
        page = client.list_sweeps(limit=limit)
    if as_json:
        print_json(page)
    elif page.data:
        comparison_text.print_sweeps(page.data)
    else:
        hint = (
            f"no sweeps yet; submit one: {text.program()} sweep FILE --grid lr=1e-4,5e-3{option_for(client.base_url)}"
        )
        text.console().print(hint, soft_wrap=True)


def compare(
    jobs: Annotated[list[str] | None, typer.Argument(metavar="[JOB]...", help=f"{A_JOB}.")] = None,
    sweep: Sweep = None,
    tag: Annotated[str | None, typer.Option(metavar="KEY[=VALUE]", help="Compare the jobs with this tag.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", "-m", help="Metric to compare; may be given several times.")
    ] = None,
    perplexity: Annotated[
        float | None, typer.Option(help="Show after how many steps and seconds each job came to this perplexity.")
    ] = None,
    best: Annotated[str | None, typer.Option(help="Metric whose best value is named; by default the first.")] = None,
    at_step: Annotated[int | None, typer.Option("--at", metavar="STEP", help="Read the series at this step.")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print a line for each checkpoint of each job as CSV.")] = False,
    curves: Annotated[
        bool | None,
        typer.Option(
            "--curves/--no-curves", help="Draw the training curves; by default in a terminal.", show_default=False
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write charts and tables to one HTML file, which opens offline.")
    ] = None,
    lang: Language = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Show jobs side by side: what differs, the figures, the best, the curves."""
    with connect(url) as client:
        ids = [_id_of_job(client, job) for job in jobs or []]
        which: dict[str, Any] = {"sweep": None if sweep is None else sweep_id_or_name(client, sweep), "tag": tag}
        asked: dict[str, Any] = {"metrics": metric, "perplexity": perplexity, "best": best, "at_step": at_step}
        if csv:
            sys.stdout.write(client.compare_csv(*ids, **which, **asked))
            return
        if html is not None:
            html.write_text(client.compare_html(*ids, **which, **asked, lang=lang or text.language()), encoding="utf-8")
            text.console(stderr=True).print(f"wrote {html}", soft_wrap=True)
            return
        found = client.compare(*ids, **which, **asked)
        are_drawn = not as_json and (sys.stdout.isatty() if curves is None else curves)
        series = client.compare_series(*ids, **which) if are_drawn else None
        _show(client, found.view, series, as_json)


def presets(lang: Language = None, url: Url = None, as_json: Json = False) -> None:
    """List the ready experiments."""
    with connect(url) as client:
        found = client.presets()
    if as_json:
        print_json(found)
        return
    console = text.console()
    for one in found:
        console.print(Text(one.name, "bold"))
        console.print(text.hanging(Text(f"  {_look_at(one, lang)}"), console))
    console.print(Text(f"run one: {text.program()} run {found[0].name}", text.DIM))


def run(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the experiment; nanomoe presets lists them.")],
    lang: Language = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Run a ready experiment, and compare its jobs."""
    with connect(url) as client:
        by_name = {one.name: one for one in client.presets()}
        if name not in by_name:
            raise UsageError(f"there is no experiment {name!r}; there are {', '.join(by_name)}")
        preset = by_name[name]
        if not as_json:
            text.console().print(Text(_look_at(preset, lang), text.DIM), soft_wrap=True)
        request = preset.sweep
        handle = client.sweep(
            request.text, request.config, grid=request.grid, points=request.points, seeds=request.seeds, name=name
        )
        raise typer.Exit(_watch(handle, preset.compare, as_json=as_json))


def _look_at(preset: schemas.PresetView, lang: Literal["en", "pt"] | None) -> str:
    return preset.look_at.pt if (lang or text.language()) == "pt" else preset.look_at.en


def _id_of_job(client: Client, given: str) -> str:
    reference = Reference.parse(given)
    if reference.checkpoint is not None:
        raise UsageError(f"{given!r} names a checkpoint; whole jobs are compared")
    return reference.id_or_name(client)


def _introduce(handle: SweepHandle) -> None:
    console = text.console()
    console.print(Text.assemble(f"sweep {handle.id}  ", comparison_text.sweep_line(handle.view)))


def _watch(handle: SweepHandle, asked: schemas.PresetCompare | None = None, *, as_json: bool) -> int:
    """Show a sweep until all of its jobs have ended, and compare them; returns the exit code."""
    if not as_json:
        _introduce(handle)
    try:
        code = follow_sweep(handle, as_json=as_json)
    except KeyboardInterrupt:
        at = option_for(handle.client.base_url)
        hint = f"the jobs go on; compare them: {text.program()} compare --sweep {handle.id}{at}"
        text.console(stderr=True).print(hint, soft_wrap=True)
        return INTERRUPTED
    metrics, perplexity = (None, None) if asked is None else (asked.metric, asked.perplexity)
    found = handle.compare(metrics, perplexity=perplexity)
    _show(handle.client, found.view, handle.series() if sys.stdout.isatty() and not as_json else None, as_json)
    return code


def _show(client: Client, found: schemas.Comparison, series: list[schemas.JobEnvelope] | None, as_json: bool) -> None:
    """A comparison, the continuations where their sampling varies, and the curves where they were asked for."""
    if as_json:
        print_json(found)
        return
    comparison_text.print_comparison(found)
    if any(one.name in SampleConfig.model_fields for one in found.parameters):
        for group in found.groups[:_N_CONTINUED]:
            measured = client.send(calls.metrics(group.job_ids[0], points=8, tokens=False))
            comparison_text.print_continuations(group, measured)
        if len(found.groups) > _N_CONTINUED:
            note = f"the continuations of {len(found.groups) - _N_CONTINUED:,} more: {text.program()} metrics JOB"
            text.console().print(Text(note, text.DIM))
    if series is not None:
        comparison_text.print_curves(found, series)


_N_CONTINUED = 8
"""Most groups whose continuations are shown."""


def _show_estimate(estimate: schemas.SweepEstimate, as_json: bool) -> None:
    if as_json:
        print_json(estimate)
        return
    console = text.console()
    steps = "" if estimate.total_steps is None else f", {estimate.total_steps:,} steps"
    console.print(f"{estimate.n_jobs:,} jobs{steps}{_predicted_time(estimate)}")
    table = text.new_table(">jobs", ">parameters", ">steps", ">memory", ">together")
    for shape in estimate.shapes:
        memory = "–" if shape.training_bytes is None else f"{text.millions(shape.training_bytes)}B"
        table.add_row(
            str(shape.n_jobs),
            text.millions(shape.n_params),
            text.number(shape.total_steps),
            memory,
            text.number(shape.together),
        )
    text.print_table(table)
    console.print(_cohorts(estimate.cohorts))
    for warning in estimate.warnings:
        line = f"{warning.code} ({warning.n_jobs:,} jobs): {text.visible(warning.message)}"
        console.print(text.hanging(Text.assemble(("warning ", "yellow"), line), console))


def _predicted_time(estimate: schemas.SweepEstimate) -> str:
    together, alone = estimate.predicted_seconds, estimate.predicted_alone_seconds
    if together is None:
        return "" if alone is None else f", about {text.duration(alone)} if each is trained alone"
    is_other = any(one.n_jobs > 1 for one in estimate.cohorts or ())
    compared = f" ({text.duration(alone)} if each is trained alone)" if alone is not None and is_other else ""
    return f", about {text.duration(together)}{compared}"


def _cohorts(found: list[schemas.SweepCohorts] | None) -> str:
    """Which jobs are trained together."""
    if found is None:
        return "together: not known, no worker with the memory for all of them is running"
    if all(one.n_jobs == 1 for one in found):
        return "together: none, each job is trained alone"
    cohorts = [f"{one.n_cohorts:,} x {one.n_jobs:,} jobs" for one in found if one.n_jobs > 1]
    alone = sum(one.n_cohorts for one in found if one.n_jobs == 1)
    return f"together: {', '.join([*cohorts, *([f'{alone:,} alone'] if alone else [])])}"
