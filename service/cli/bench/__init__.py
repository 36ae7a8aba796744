"""`nanomoe bench`: benchmarks of this machine, beside other implementations and the limits of its hardware."""

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
"""Largest number that an option's list may hold."""

app = typer.Typer(
    name="bench",
    help="Benchmark this machine, beside other implementations of the same work.",
    no_args_is_help=True,
)


@app.command(cls=Command)
def generate(
    vocab: Annotated[str, typer.Option(metavar="N,...", help="Vocabulary sizes to measure.")] = "8192,50257",
    models: Annotated[
        str, typer.Option(metavar="NAME,...", help="Models to measure: dense, mixture.")
    ] = "dense,mixture",
    at_once: Annotated[
        str, typer.Option(metavar="N,...", help="Numbers of texts that are generated at the same time.")
    ] = "1,8,32,128",
    turns: Annotated[int, typer.Option(min=1, help="Repetitions of each measurement; medians are shown.")] = 3,
    http: Annotated[bool, typer.Option(help="Also measure through HTTP, with a temporary service.")] = True,
    transformers: Annotated[bool, typer.Option(help="Also measure transformers' cached generate.")] = True,
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
        str, typer.Option(metavar="N,...", help="Numbers of queued jobs for which claims are timed.")
    ] = "1,1000,1000000",
    seconds: Annotated[float, typer.Option(min=1, help="Seconds for which submissions are counted.")] = 10,
    settle: Annotated[float, typer.Option(min=0, help="Seconds in which a trainer warms up before a measurement.")] = 8,
    n_jobs: Annotated[int, typer.Option("--jobs", min=1, help="Number of jobs that are submitted and cancelled.")] = 5,
    leases: Annotated[
        str, typer.Option(metavar="SECONDS,...", help="Lease lengths for which recovery from a killed worker is timed.")
    ] = "60",
    database_url: Annotated[
        str | None,
        typer.Option(help="URL of an empty PostgreSQL database, in place of SQLite; recovery is measured on SQLite."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Claims, submissions, and the times until a job starts, stops, and recovers from a killed worker."""
    from service.cli.bench import lifecycle as measured
    from service.cli.bench.temporary_service import run_service

    lengths, lease_seconds = _numbers("--queued", queued), _numbers("--leases", leases)
    with text.console(stderr=True).status("measuring") as status:
        with run_service(database_url) as service:
            idle = measured.traffic(service, training=False, seconds=seconds)
            service.processes.start_worker()
            status.update("jobs on a worker")
            delays = measured.delays(service, n_jobs, settle)
            busy = measured.traffic(service, training=True, seconds=seconds)
            status.update("training beside a stream")
            disturbed = measured.beside(service, n_jobs, seconds)
            service.processes.kill("worker")  # or it would claim what is timed
            status.update("claims")
            claims = list(measured.claim_times(service.database, lengths))
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
