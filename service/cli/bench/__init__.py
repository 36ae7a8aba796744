"""`nanomoe bench`: how fast this machine is, beside others who do the same work and the limit of its hardware."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli import text
from service.cli.bench import tables
from service.cli.commands import Command
from service.cli.output import Json, print_json
from service.cli.usage_error import UsageError

if TYPE_CHECKING:
    from nanomoe.bench.generation import Figures
    from service.cli.bench.served import Served

_LARGEST = 1_000_000
"""Largest number in an option's list."""

app = typer.Typer(
    name="bench",
    help="Measure this machine, beside others who do the same work.",
    no_args_is_help=True,
)


@app.command(cls=Command)
def generate(
    vocab: Annotated[str, typer.Option(metavar="N,...", help="Sizes of the vocabulary.")] = "8192,50257",
    models: Annotated[str, typer.Option(metavar="NAME,...", help="dense, mixture.")] = "dense,mixture",
    at_once: Annotated[str, typer.Option(metavar="N,...", help="Texts that are continued together.")] = "1,8,32,128",
    turns: Annotated[int, typer.Option(min=1, help="Times that everything is measured; medians are shown.")] = 3,
    http: Annotated[bool, typer.Option(help="Also through a service of its own.")] = True,
    transformers: Annotated[bool, typer.Option(help="Also beside transformers' cached generate.")] = True,
    as_json: Json = False,
) -> None:
    """Tokens a second and time to the first token: the engine, nanoGPT's loop, transformers, and through HTTP."""
    from nanomoe.bench import generation
    from nanomoe.bench.models import MODELS

    names = [name.strip() for name in models.split(",")]
    if unknown := set(names) - set(MODELS):
        raise UsageError(f"--models {', '.join(sorted(unknown))}: there are {', '.join(MODELS)}")
    sizes, crowds = _numbers("--vocab", vocab), _numbers("--at-once", at_once)
    console = text.console(stderr=True)
    figures: list[Figures] = []
    served: list[Served] = []
    for size in sizes:
        for name in names:
            with console.status("measuring") as status:
                figures.append(
                    generation.measure(
                        name, size, at_once=crowds, turns=turns, with_transformers=transformers, said=status.update
                    )
                )
                if http:
                    from service.cli.bench import served as through_http

                    status.update(f"{name}, {size:,} entries, through HTTP")
                    served += through_http.measure(name, size, at_once=crowds, turns=turns)
    if as_json:
        print_json({"engine": [asdict(one) for one in figures], "http": [asdict(one) for one in served]})
        return
    shown = [tables.generation_table(figures), tables.first_token_table(figures)]
    for table in [*shown, tables.served_table(served)] if served else shown:
        text.print_table(table)
        text.console().print()
    for line in tables.numerics(figures):
        text.console().print(line, style=text.DIM)


@app.command(cls=Command)
def jobs(
    queued: Annotated[
        str, typer.Option(metavar="N,...", help="Jobs in line when a claim is timed.")
    ] = "1,1000,1000000",
    seconds: Annotated[float, typer.Option(min=1, help="How long submissions are counted.")] = 10,
    settle: Annotated[float, typer.Option(min=0, help="Seconds that a trainer gets to warm up in.")] = 8,
    n_jobs: Annotated[int, typer.Option("--jobs", min=1, help="Jobs that are submitted and cancelled.")] = 5,
    leases: Annotated[str, typer.Option(metavar="SECONDS,...", help="Kill a worker with each of these leases.")] = "60",
    database_url: Annotated[
        str | None,
        typer.Option(help="An empty PostgreSQL database; SQLite unless given. Workers are killed on SQLite."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Claims, submissions, and how long a user waits for a job to begin, to stop, and to survive its worker."""
    from service.cli.bench import lifecycle as measured
    from service.cli.bench.site import open_site

    lengths, lease_seconds = _numbers("--queued", queued), _numbers("--leases", leases)
    with text.console(stderr=True).status("measuring") as status:
        with open_site(database_url) as site:
            idle = measured.traffic(site, training=False, seconds=seconds)
            site.processes.start_worker()
            status.update("jobs on a worker")
            delays = measured.delays(site, n_jobs, settle)
            busy = measured.traffic(site, training=True, seconds=seconds)
            status.update("training beside a stream")
            disturbed = measured.beside(site, n_jobs, seconds)
            site.processes.kill("worker")  # or it would claim what is timed
            status.update("claims")
            claims = list(measured.claim_times(site.database, lengths))
        status.update("killing workers")
        recoveries = [measured.recovery(lease, settle) for lease in lease_seconds]
    if as_json:
        print_json(
            {
                "claims": [asdict(one) for one in claims],
                "traffic": [asdict(idle), asdict(busy)],
                "delays": asdict(delays),
                "beside": asdict(disturbed),
                "recoveries": [asdict(one) for one in recoveries],
            }
        )
        return
    for table in (
        tables.claims_table(claims),
        tables.traffic_table([idle, busy]),
        tables.delays_table(delays, recoveries),
        tables.beside_table(disturbed),
    ):
        text.print_table(table)
        text.console().print()


def _numbers(option: str, given: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(number) for number in given.split(","))
    except ValueError:
        raise UsageError(f"{option} {given!r} must look like 1,8,32") from None
    if not all(0 < number <= _LARGEST for number in numbers):
        raise UsageError(f"{option} {given!r}: numbers from 1 to {_LARGEST:,}")
    return numbers
