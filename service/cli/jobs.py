"""The commands about jobs of a service. Each makes a few calls of the client, and shows their responses."""

import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.text import Text

from service.cli import checkpoint_text, comparison_text, glossary, job_text, text
from service.cli.addresses import option_for
from service.cli.display import JsonDisplay, TextDisplay, follow
from service.cli.knobs import config_of, settings_of
from service.cli.options import A_JOB, ConfigFile, Job, JobUnlessSweep, Set, Sweep, Url, connect
from service.cli.output import Json, print_json, to_json
from service.cli.references import LATEST, Reference, sweep_id_or_name
from service.cli.usage_error import UsageError
from service.client import Client, JobHandle, SweepHandle
from service.http import schemas
from service.http.schemas.jobs import split_tag

SAMPLING = {
    name: field
    for name, field in schemas.GenerateRequest.model_fields.items()
    if name not in ("job_id", "checkpoint", "targets", "prompt", "stream")
}
"""Fields that `generate --set` may change: the other fields are arguments and options of their own."""

_STATUSES = ", ".join(get_args(schemas.Status))

SUCCEEDED, FAILED, INTERRUPTED = 0, 1, 130
"""Exit codes; `main` adds 2 for a usage error, and 3 for a service that does not answer."""


def submit(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The training text in UTF-8; - is standard input.")],
    set_: Set = None,
    config: ConfigFile = None,
    name: Annotated[str | None, typer.Option(help="Name of the job, shown in lists.")] = None,
    tag: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A label of the job; may be given several times.")
    ] = None,
    priority: Annotated[int, typer.Option(help="Priority, -100 to 100; a higher one is claimed sooner.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print size, steps and warnings of the job without submitting it.")
    ] = False,
    watch_: Annotated[bool, typer.Option("--watch", "-w", help="Follow the job to its end.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Train a model on a text."""
    job_config = config_of(config, set_ or [])
    given = read_text(file)
    with connect(url) as client:
        if dry_run:
            _show_estimate(client.estimate(given, job_config), as_json)
            return
        job = client.submit(given, job_config, name=name, tags=tags_of(tag or []), priority=priority)
        if watch_:
            raise typer.Exit(watch_to_the_end(job, as_json=as_json))
    if as_json:
        print_json(job.view)
    else:
        introduce(job.view)
        hint = f"watch it: {text.program()} watch {job.id}{option_for(client.base_url)}"
        text.console().print(hint, soft_wrap=True)


def watch(job: Job = LATEST, url: Url = None, as_json: Json = False) -> None:
    """Follow a job to its end: a bar, and each quarter as it is recorded. Ctrl-C does not stop the job."""
    with connect(url) as client:
        raise typer.Exit(watch_to_the_end(Reference.parse(job).find(client), as_json=as_json))


def jobs(
    status: Annotated[str | None, typer.Option(help=f"Only jobs with this status: {_STATUSES}.")] = None,
    tag: Annotated[str | None, typer.Option(metavar="KEY[=VALUE]", help="Only jobs with this tag.")] = None,
    limit: Annotated[int, typer.Option(help="Most jobs to list.")] = 20,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """List the newest jobs: loss, perplexity, and the knobs that differ from the defaults."""
    with connect(url) as client:
        page = client.list_jobs(status=status, tag=tag, limit=limit)
        shown = page.data if as_json else _with_positions(client, page.data)
    if as_json:
        print_json(page)
    elif shown:
        job_text.print_jobs(shown)
    else:
        hint = f"no jobs yet; submit one: {text.program()} submit FILE{option_for(client.base_url)}"
        text.console().print("no jobs" if status or tag else hint, soft_wrap=True)


_N_POSITIONS = 20
"""Most queued jobs whose queue position is requested: the next ones."""


def _with_positions(client: Client, jobs: list[schemas.JobView]) -> list[schemas.JobView]:
    """The jobs of a list, newest first, with queue positions, which a list does not have."""
    first = [job.id for job in jobs if job.status == "queued"][-_N_POSITIONS:]
    return [_with_position(client, job) if job.id in first else job for job in jobs]


def _with_position(client: Client, job: schemas.JobView) -> schemas.JobView:
    return client.job(job.id).view.model_copy(update={"figures": job.figures})


def metrics(
    jobs: Annotated[list[str] | None, typer.Argument(metavar="[JOB]...", help=f"{A_JOB}; several in turn.")] = None,
    points: Annotated[int, typer.Option(help="Most points of the step series.")] = 1000,
    csv: Annotated[bool, typer.Option("--csv", help="Print the step series as CSV.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Print what each figure means, and nothing else.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Show each quarter: figures, reconstruction, continuation; and the curve of the training loss."""
    if explain:
        _show_glossary(as_json)
        return
    references = [Reference.parse(job) for job in jobs or [LATEST]]
    with connect(url) as client:
        handles = [reference.find(client) for reference in references]
        if csv:
            _print_csv(handles)
            return
        measured = []
        for place, handle in enumerate(handles):
            measured.append(handle.metrics(points=points))
            if not as_json:
                if place:
                    text.console().print()
                _show_metrics(handle, measured[-1])
    if as_json:
        print_json(measured[0] if len(measured) == 1 else measured)
    else:
        text.console().print(checkpoint_text.glossary_hint())


def _print_csv(handles: list[JobHandle]) -> None:
    """The step series of a job; of several in one table, whose first column is the job's id."""
    if len(handles) == 1:
        sys.stdout.write(handles[0].metrics_csv())
        return
    for place, handle in enumerate(handles):
        header, *rows = handle.metrics_csv().splitlines()
        lines = [*([] if place else [f"job_id,{header}"]), *(f"{handle.id},{row}" for row in rows)]
        sys.stdout.write("".join(f"{line}\n" for line in lines))


def _show_metrics(handle: JobHandle, measured: schemas.Metrics) -> None:
    console = text.console()
    console.print(job_text.job_line(handle.view))
    with TextDisplay(console, introduced=handle.view, n_lines=3) as display:
        for checkpoint in measured.checkpoints:
            display.quarter(checkpoint)
    if measured.steps.step:
        console.print(checkpoint_text.loss_curve(measured.steps, console))
    if handle.view.config.use_moe and measured.checkpoints:
        console.print()
        text.print_table(checkpoint_text.mixture_table(measured.checkpoints))


def _show_glossary(as_json: bool) -> None:
    sections = glossary.sections()
    if as_json:
        print_json(sections)
        return
    for heading, words in sections.items():
        text.console().print(Text(heading, "bold"))
        text.print_table(checkpoint_text.glossary_table(words))


def generate(
    targets: Annotated[
        list[str], typer.Argument(metavar="JOB[@PERCENT]...", help="Checkpoints to generate from, such as latest@50.")
    ],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-s", metavar="FIELD=VALUE", help="max_new_tokens, temperature, top_k, top_p, seed, n, stop, ..."
        ),
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text while it is generated.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt from one checkpoint, or from several with the same seed."""
    sampling = settings_of(SAMPLING, set_ or [])
    if stream:
        _stream(targets, prompt, sampling, url, as_json)
        return
    references = [Reference.parse(target) for target in targets]
    with connect(url) as client:
        waiting = f"loading {', '.join(map(str, references))}"
        with text.waiting(waiting, quiet=as_json):
            if len(references) == 1:
                job = references[0].find(client)
                answers = [job.generate(prompt, references[0].checkpoint or "latest", **sampling)]
            else:
                named = [(one.id_or_name(client), one.checkpoint or "latest") for one in references]
                answers = client.generate(named, prompt, **sampling).answers
    if as_json:
        print_json(answers[0] if len(answers) == 1 else answers)
        return
    for answer in answers:
        show_generated(answer, f"{answer.job_id}@{answer.checkpoint}" if len(answers) > 1 else None)


def _stream(targets: list[str], prompt: str, sampling: dict[str, Any], url: str | None, as_json: bool) -> None:
    if len(targets) > 1 or sampling.get("n", 1) != 1:
        raise UsageError("--stream shows one text at a time: name one checkpoint, and do not set n")
    reference = Reference.parse(targets[0])
    console = text.console()
    with connect(url) as client:
        begun = False
        with text.waiting(f"loading {reference}", quiet=as_json):
            job = reference.find(client)
            pieces = job.generate(prompt, reference.checkpoint or "latest", stream=True, **sampling)
            first = next(pieces)
        for piece in chain([first], pieces):
            if as_json:
                print(to_json(piece), flush=True)
            elif isinstance(piece, schemas.GenerateChunk):
                text.print_piece(console, "" if begun else prompt, piece.text)
                begun = True
    if not as_json:
        print()


def cancel(job: JobUnlessSweep = None, sweep: Sweep = None, url: Url = None, as_json: Json = False) -> None:
    """Stop a job, or all of a sweep, for good; the checkpoints stay."""
    _change(job, sweep, JobHandle.cancel, SweepHandle.cancel, url, as_json)


def pause(job: JobUnlessSweep = None, sweep: Sweep = None, url: Url = None, as_json: Json = False) -> None:
    """Stop a job, or all of a sweep, until it is resumed."""
    _change(job, sweep, JobHandle.pause, SweepHandle.pause, url, as_json)


def resume(job: JobUnlessSweep = None, sweep: Sweep = None, url: Url = None, as_json: Json = False) -> None:
    """Put a paused job, or those of a sweep, back into the queue, to continue where it stopped."""
    _change(job, sweep, JobHandle.resume, SweepHandle.resume, url, as_json)


def _change(
    job: str | None,
    sweep: str | None,
    of_job: Callable[[JobHandle], schemas.JobView],
    of_sweep: Callable[[SweepHandle], schemas.SweepView],
    url: str | None,
    as_json: bool,
) -> None:
    """Request a change of the job or of the sweep that is named, and show it."""
    with connect(url) as client:
        found = _job_or_sweep(client, job, sweep)
        changed = of_job(found) if isinstance(found, JobHandle) else of_sweep(found)
    if as_json:
        print_json(changed)
    elif isinstance(changed, schemas.JobView):
        text.console().print(job_text.job_line(changed))
    else:
        text.console().print(Text.assemble(f"sweep {changed.id}  ", comparison_text.sweep_line(changed)))


def _job_or_sweep(client: Client, job: str | None, sweep: str | None) -> JobHandle | SweepHandle:
    if (job is None) == (sweep is None):
        raise UsageError("name a job, or a sweep with --sweep")
    if sweep is not None:
        return client.get_sweep(sweep_id_or_name(client, sweep))
    return Reference.parse(job or LATEST).find(client)


def delete(
    job: JobUnlessSweep = None,
    sweep: Sweep = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking for confirmation.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Delete a finished job, or a sweep with its jobs: metrics and checkpoints too."""
    with connect(url) as client:
        handle = _job_or_sweep(client, job, sweep)
        if not yes and sys.stdin.isatty():
            of_jobs = f" of {len(handle.job_ids or ())} jobs" if isinstance(handle, SweepHandle) else ""
            typer.confirm(f"Delete {handle.id} ({handle.name or 'no name'}) and its checkpoints{of_jobs}?", abort=True)
        handle.delete()
    if as_json:
        print_json({"deleted": handle.id})
    else:
        text.console().print(f"deleted {handle.id}")


def read_text(file: str) -> str:
    """The text of a file, or of standard input for `-`, without a byte-order mark; raises UsageError."""
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return content.decode("utf-8").removeprefix(schemas.BYTE_ORDER_MARK)
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8: byte {error.start} is {content[error.start]:#04x}") from None


def introduce(job: schemas.JobView) -> None:
    """Print id, size and warnings of a job."""
    console = text.console()
    console.print(job_text.job_line(job))
    console.print(job_text.size_line(job.config, job.model, job.text.n_tokens, job.progress.total_steps))
    for warning in job.warnings:
        console.print(job_text.warning_line(warning.code, warning.message, console))


def watch_to_the_end(job: JobHandle, *, as_json: bool = False) -> int:
    """Show the job until it has ended; returns the exit code. Ctrl-C stops showing it, and the job continues."""
    if not as_json:
        introduce(job.view)
    at = option_for(job.client.base_url)
    try:
        hint = f"; go on with: {text.program()} generate {job.id} PROMPT{at}"
        return show_to_the_end(job, as_json=as_json, hint=hint)
    except KeyboardInterrupt:
        hint = f"the job goes on; come back with: {text.program()} watch {job.id}{at}"
        text.console(stderr=True).print(hint, soft_wrap=True)
        return INTERRUPTED


def show_to_the_end(job: JobHandle, *, as_json: bool = False, n_lines: int = 1, hint: str = "") -> int:
    """Show the job until it has ended, and its end, with a `hint` if it succeeded; returns the exit code."""
    console = text.console()
    with JsonDisplay() if as_json else TextDisplay(console, introduced=job.view, n_lines=n_lines) as display:
        ended = follow(job, display)
    if as_json:
        print(to_json({"event": "job", "data": ended}))
    else:
        ending = job_text.ending(ended).append(hint if ended.status == "succeeded" else "", text.DIM)
        console.print(ending, soft_wrap=True)
        console.print(checkpoint_text.glossary_hint())
    return SUCCEEDED if ended.status == "succeeded" else FAILED


def show_generated(answer: schemas.GenerateResponse, heading: str | None) -> None:
    """The prompt and each continuation; in a pipe exactly the model's text."""
    console = text.console()
    if heading is not None:
        console.print(Text(heading, "bold"))
    for choice in answer.choices:
        text.print_piece(console, answer.prompt, choice.text)
        print()


def _show_estimate(estimate: schemas.Estimate, as_json: bool) -> None:
    if as_json:
        print_json(estimate)
        return
    console = text.console()
    console.print(job_text.size_line(estimate.config, estimate.model, estimate.text.n_tokens, estimate.total_steps))
    if estimate.quarters:
        quarters = ", ".join(f"{percent} % at step {step:,}" for percent, step in estimate.quarters.items())
        console.print(f"quarters: {quarters}")
    if estimate.training_bytes is not None:
        console.print(f"memory: about {text.millions(estimate.training_bytes)}B")
    for warning in estimate.warnings:
        console.print(job_text.warning_line(warning.code, warning.message, console))


def tags_of(given: list[str]) -> dict[str, str]:
    """`["a=b"]` -> `{"a": "b"}`; raises UsageError."""
    tags = {}
    for tag in given:
        key, value = split_tag(tag)
        if value is None:
            raise UsageError(f"--tag {tag!r} must look like key=value")
        tags[key] = value
    return tags
