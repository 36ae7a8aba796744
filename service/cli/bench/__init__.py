"""`nanomoe bench`: benchmarks of this machine, beside other implementations and the limits of its hardware."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli import text
from service.cli.bench import tables
from service.cli.bench.devices import device_named
from service.cli.bench.lists import names, numbers
from service.cli.bench.train import train
from service.cli.commands import Command
from service.cli.output import Json, print_json

if TYPE_CHECKING:
    from nanomoe.bench.generation import Figures
    from service.cli.bench.served import Served

_MEASUREMENTS = ("traffic", "delays", "beside", "turnaround", "claims", "queue", "sweeps", "recovery")
_ON_REQUEST = ("cohort",)
"""Measurements that take a quarter of an hour and more."""

app = typer.Typer(
    name="bench",
    help="Benchmark this machine, beside other implementations of the same work.",
    no_args_is_help=True,
)
app.command(cls=Command)(train)


@app.command(cls=Command)
def generate(
    vocab: Annotated[str, typer.Option(metavar="N,...", help="Vocabulary sizes to measure.")] = "8192,50257",
    models: Annotated[
        str, typer.Option(metavar="NAME,...", help="Models to measure: dense, mixture.")
    ] = "dense,mixture",
    at_once: Annotated[
        str, typer.Option(metavar="N,...", help="Numbers of texts that are generated at the same time.")
    ] = "1,8,32,128",
    device: Annotated[
        str, typer.Option(help="Device to measure: cpu, cuda or cuda:N. Through HTTP it is the service's own.")
    ] = "cpu",
    turns: Annotated[int, typer.Option(min=1, help="Repetitions of each measurement; medians are shown.")] = 3,
    http: Annotated[bool, typer.Option(help="Also measure through HTTP, with a temporary service.")] = True,
    transformers: Annotated[bool, typer.Option(help="Also measure transformers' cached generate.")] = True,
    as_json: Json = False,
) -> None:
    """Tokens a second and time to the first token: the engine, nanoGPT's loop, transformers, and through HTTP."""
    from nanomoe.bench import generation
    from nanomoe.bench.models import MODELS

    on = device_named(device)
    chosen = names("--models", models, tuple(MODELS))
    sizes, crowds = numbers("--vocab", vocab), numbers("--at-once", at_once)
    console = text.console(stderr=True)
    figures: list[Figures] = []
    served: list[Served] = []
    for size in sizes:
        for name in chosen:
            with console.status("measuring") as status:
                figures.append(
                    generation.measure(
                        name,
                        size,
                        device=on,
                        at_once=crowds,
                        turns=turns,
                        with_transformers=transformers,
                        said=status.update,
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
    only: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="Measurements to make: traffic, delays, beside, turnaround, claims, queue, sweeps, recovery; and "
            "cohort, which is made only when it is named.",
        ),
    ] = ",".join(_MEASUREMENTS),
    queued: Annotated[
        str, typer.Option(metavar="N,...", help="Numbers of queued jobs for which claims are timed.")
    ] = "1,1000,1000000",
    seconds: Annotated[float, typer.Option(min=1, help="Seconds for which submissions are counted.")] = 10,
    settle: Annotated[float, typer.Option(min=0, help="Seconds in which a trainer warms up before a measurement.")] = 8,
    n_jobs: Annotated[
        int,
        typer.Option(
            "--jobs", min=1, help="Number of jobs that are submitted and cancelled, and of repetitions for sweeps."
        ),
    ] = 5,
    n_tiny: Annotated[int, typer.Option("--tiny", min=1, help="Most tiny jobs that are counted.")] = 30,
    job_steps: Annotated[
        int | None,
        typer.Option(
            min=4, help="Optimizer steps of the reference job, in place of all; of each job of cohort, in place of 100."
        ),
    ] = None,
    script: Annotated[bool, typer.Option(help="Also run the reference job's training as a plain script.")] = True,
    most_seconds: Annotated[
        float, typer.Option(min=0, help="Seconds after which turnaround begins no further repetition.")
    ] = 120,
    connections: Annotated[
        int, typer.Option(min=1, help="Number of processes that submit, claim and finish at once for queue.")
    ] = 8,
    batches: Annotated[
        str, typer.Option(metavar="N,...", help="Numbers of jobs that are claimed or finished together for queue.")
    ] = "1,8",
    rows: Annotated[int, typer.Option(min=0, help="Ended jobs in the table beforehand for queue.")] = 0,
    held_open: Annotated[
        bool, typer.Option("--held-open", help="For queue, hold another transaction open meanwhile.")
    ] = False,
    leases: Annotated[
        str, typer.Option(metavar="SECONDS,...", help="Lease lengths for which recovery from a killed worker is timed.")
    ] = "60",
    shapes: Annotated[
        str, typer.Option(metavar="NAME,...", help="Shapes of the jobs for cohort: reference, narrow-bytes.")
    ] = "reference,narrow-bytes",
    widths: Annotated[
        str, typer.Option(metavar="N,...", help="Numbers of jobs that are trained together for cohort.")
    ] = "1,4,16,64",
    in_sweep: Annotated[int, typer.Option(min=2, max=1000, help="Jobs of the sweep for cohort.")] = 64,
    database_url: Annotated[
        str | None,
        typer.Option(
            help="URL of an empty PostgreSQL database, in place of SQLite; recovery and cohort are measured on SQLite."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Claims, submissions, and the times until a job starts, ends, stops, follows another, and recovers."""
    from service.cli.bench import lifecycle as measured
    from service.cli.bench.cohort_rates import SHAPES as COHORT_SHAPES
    from service.cli.bench.cohort_rates import CohortRate
    from service.cli.bench.cohort_rates import measure as measure_cohorts
    from service.cli.bench.queue_rates import QueueRates
    from service.cli.bench.queue_rates import measure as measure_queue
    from service.cli.bench.sweep_requests import SweepTimes
    from service.cli.bench.sweep_requests import measure as measure_sweeps
    from service.cli.bench.temporary_service import run_service
    from service.cli.bench.turnaround import Turnaround
    from service.cli.bench.turnaround import measure as measure_turnaround

    wanted = names("--only", only, (*_MEASUREMENTS, *_ON_REQUEST))
    together, kinds = numbers("--widths", widths), names("--shapes", shapes, tuple(COHORT_SHAPES))
    lengths, lease_seconds, at_once = (
        numbers("--queued", queued), numbers("--leases", leases), numbers("--batches", batches),
    )  # fmt: skip
    traffic: list[measured.Traffic] = []
    delays: measured.Delays | None = None
    disturbed: measured.Beside | None = None
    turnaround: Turnaround | None = None
    claims: list[measured.ClaimTime] = []
    rates: QueueRates | None = None
    sweeps: SweepTimes | None = None
    recoveries: list[measured.Recovery] = []
    cohorts: list[CohortRate] = []
    progress = text.console(stderr=True)
    with progress.status("measuring") as status:
        with run_service(database_url) as service:
            if "traffic" in wanted:
                traffic.append(measured.traffic(service, training=False, seconds=seconds))
            if {"traffic", "delays", "beside", "turnaround"} & set(wanted):
                service.processes.start_worker()
            if "turnaround" in wanted:
                status.update("jobs one after the other")
                turnaround = measure_turnaround(
                    service,
                    n_jobs=n_jobs,
                    n_tiny=n_tiny,
                    most_seconds=most_seconds,
                    steps=job_steps,
                    script=script,
                    said=progress.print,
                )
            if "delays" in wanted:
                status.update("jobs on a worker")
                delays = measured.delays(service, n_jobs, settle)
            if "traffic" in wanted:
                status.update("submissions beside a job")
                traffic.append(measured.traffic(service, training=True, seconds=seconds))
            if "beside" in wanted:
                status.update("training beside a stream")
                disturbed = measured.beside(service, n_jobs, seconds)
            if {"claims", "queue", "sweeps"} & set(wanted) and service.processes.runs("worker"):
                service.processes.kill("worker")  # or it would claim what is timed
            if "sweeps" in wanted:
                status.update("sweeps")
                sweeps = measure_sweeps(service, turns=n_jobs)
            if "queue" in wanted:
                status.update("submits, claims and ends")
                rates = measure_queue(
                    service.settings,
                    service.database,
                    n_connections=connections,
                    at_once=at_once,
                    seconds=seconds,
                    n_rows=rows,
                    held_open=held_open,
                )
            if "claims" in wanted:
                status.update("claims")
                claims = list(measured.claim_times(service.database, lengths))
        if "cohort" in wanted:
            status.update("sweeps whose jobs are trained together")
            cohorts = measure_cohorts(kinds, together, n_jobs=in_sweep, steps=job_steps or 100, said=progress.print)
        if "recovery" in wanted:
            status.update("killing workers")
            recoveries = [measured.recovery(lease, settle) for lease in lease_seconds]
    if as_json:
        print_json(
            {
                "claims": [asdict(one) for one in claims],
                "queue": rates and asdict(rates),
                "sweeps": sweeps and asdict(sweeps),
                "traffic": [asdict(one) for one in traffic],
                "delays": delays and asdict(delays),
                "turnaround": turnaround and asdict(turnaround),
                "beside": disturbed and asdict(disturbed),
                "cohorts": [asdict(one) for one in cohorts],
                "recoveries": [asdict(one) for one in recoveries],
            }
        )
        return
    shown = []
    if claims:
        shown.append(tables.claims_table(claims))
    if rates:
        shown.append(tables.queue_table(rates))
    if sweeps:
        shown.append(tables.sweeps_table(sweeps))
    if cohorts:
        shown.append(tables.cohorts_table(cohorts))
    if traffic:
        shown.append(tables.traffic_table(traffic))
    if delays or recoveries:
        shown.append(tables.delays_table(delays, recoveries))
    if turnaround:
        shown.append(tables.turnaround_table(turnaround))
    if disturbed:
        shown.append(tables.beside_table(disturbed))
    for table in shown:
        text.print_table(table)
        text.console().print()
