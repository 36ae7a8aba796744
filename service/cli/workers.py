"""`nanomoe workers`: lists the workers, and has an engine start, show and stop a fleet of them."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli import job_text, text
from service.cli.addresses import settings
from service.cli.commands import Command
from service.cli.options import Url, connect
from service.cli.output import Json, print_json
from service.cli.usage_error import UsageError

if TYPE_CHECKING:
    from service.engines.fleet import Engine, FleetStatus

ENGINES = ("ray", "slurm")
DEFAULT_NAME = "nanomoe"

app = typer.Typer(
    name="workers", help="List the workers and their jobs, or run many on an engine.", add_completion=False
)

On = Annotated[str, typer.Option("--on", metavar="ENGINE", help=f"Engine that runs the workers: {', '.join(ENGINES)}.")]
Address = Annotated[str, typer.Option(help="Address of the Ray cluster; auto: RAY_ADDRESS, or the one of this host.")]
Slurm = Annotated[
    list[str] | None,
    typer.Option(
        "--slurm",
        metavar="KEY=VALUE",
        help="Option of sbatch, such as partition=gpu, account=lab or time=120 (minutes); may be given several times.",
    ),
]
Name = Annotated[str, typer.Option(help="Name of the fleet; its workers are NAME-0, NAME-1 and so on.")]


@app.callback(invoke_without_command=True)
def list_workers(context: typer.Context, url: Url = None, as_json: Json = False) -> None:
    """List the workers and their jobs, or run many on an engine."""
    if context.invoked_subcommand is not None:
        return
    with connect(url) as client:
        known = client.workers()
    if as_json:
        print_json(known)
    elif known:
        text.print_table(job_text.workers_table(known))
    else:
        text.console().print("no worker; start one: python -m worker (`serve` starts one with the API)")


@app.command(cls=Command)
def up(
    on: On,
    address: Address = "auto",
    count: Annotated[int | None, typer.Option(min=1, help="Workers that always run (1 without --max).")] = None,
    least: Annotated[int | None, typer.Option("--min", min=0, help="Workers that always run, with --max (0).")] = None,
    most: Annotated[int | None, typer.Option("--max", min=1, help="Most workers: as many run as jobs need.")] = None,
    cpus: Annotated[int, typer.Option(min=1, help="CPUs of each worker, and threads of its trainers.")] = 2,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of each worker.")] = 0,
    slots: Annotated[int, typer.Option(min=1, help="Jobs at once on each GPU of a worker, or on its CPUs.")] = 1,
    idle_seconds: Annotated[
        int, typer.Option(min=1, help="Seconds without a job after which a worker above --min ends; on Slurm, any.")
    ] = 300,
    slurm: Slurm = None,
    name: Name = DEFAULT_NAME,
    as_json: Json = False,
) -> None:
    """Start a fleet of workers, or change one. Asked for the same again, nothing happens."""
    from service.engines.fleet import EngineError, Fleet, environment_of

    if on == "slurm" and (least is not None or most is not None):
        raise UsageError(
            "--min and --max are for Ray: on Slurm nothing follows the queue. Give --count; a worker without a job "
            "ends, and `workers up` starts it again"
        )
    if count is not None and (least is not None or most is not None):
        raise UsageError("--count is a fixed number of workers: give it, or --min and --max")
    if least is not None and most is None:
        raise UsageError("--min needs --max, the most workers that may run")
    least, most = (count or 1, count or 1) if most is None else (least or 0, most)
    if on == "slurm":
        least = 0  # an allocation is given back where there is nothing to do
    if least > most:
        raise UsageError(f"--min {least} is more than --max {most}")
    fleet = Fleet(
        _checked(name),
        least,
        most,
        cpus=cpus,
        gpus=gpus,
        slots=slots,
        idle_seconds=idle_seconds,
        environment=environment_of(settings(), os.environ),
    )
    try:
        status = _engine(on, address, slurm or ()).up(fleet)
    except EngineError as error:
        raise UsageError(f"{error.code}: {error.detail}") from None
    _show(status, as_json)


@app.command(cls=Command)
def status(on: On, address: Address = "auto", name: Name = DEFAULT_NAME, as_json: Json = False) -> None:
    """Show what the engine says of each worker of a fleet."""
    from service.engines.fleet import EngineError

    try:
        found = _engine(on, address).status(_checked(name))
    except EngineError as error:
        raise UsageError(f"{error.code}: {error.detail}") from None
    _show(found, as_json)


@app.command(cls=Command)
def down(
    on: On,
    address: Address = "auto",
    name: Name = DEFAULT_NAME,
    now: Annotated[
        bool, typer.Option("--now", help="Do not wait for snapshots: jobs go on from their last ones.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Stop a fleet: its jobs write snapshots and return to the queue, and its workers end."""
    from service.engines.fleet import EngineError

    try:
        with text.waiting(f"waiting for the workers of {name} to end", quiet=as_json):
            ended = _engine(on, address).down(_checked(name), now=now)
    except EngineError as error:
        raise UsageError(f"{error.code}: {error.detail}") from None
    if as_json:
        print_json({"name": name, "ended": [worker.name for worker in ended]})
    else:
        text.console().print(f"{name}: {len(ended)} workers have ended")


def _engine(on: str, address: str, slurm: Sequence[str] = ()) -> "Engine":
    """The engine of that name. Raises EngineError."""
    if on not in ENGINES:
        raise UsageError(f"--on {on!r} is none of {', '.join(ENGINES)}")
    if on != "slurm" and slurm:
        raise UsageError("--slurm is for --on slurm")
    if on != "ray" and address != "auto":
        raise UsageError("--address is for --on ray")
    try:
        if on == "slurm":
            from service.engines.on_slurm import SlurmEngine

            return SlurmEngine(settings().data_dir, slurm)
        from service.engines.on_ray import RayEngine
    except ModuleNotFoundError as error:
        if error.name not in ("ray", "submitit"):
            raise
        raise UsageError(f"the engine {on} is an extra: pip install 'nanomoe[{on}]'") from None
    return RayEngine(address)


def _checked(name: str) -> str:
    from service.engines.fleet import NAME

    if NAME.fullmatch(name) is None:
        raise UsageError(f"--name {name!r} must be of small letters, digits and `-`, and at most 40 of them")
    return name


def _show(found: "FleetStatus", as_json: bool) -> None:
    if as_json:
        print_json(found.view())
        return
    if (fleet := found.fleet) is not None:
        size = str(fleet.most) if fleet.least == fleet.most else f"{fleet.least} to {fleet.most}"
        each = f"{fleet.cpus} CPUs" + (f", {fleet.gpus} GPUs" if fleet.gpus else "")
        text.console().print(f"{found.name}: {size} workers with {each} each")
    if found.problem:
        text.console(stderr=True).print(text.visible(found.problem), style=text.WRONG, soft_wrap=True)
    if not found.workers:
        text.console().print("no worker yet" if fleet is None or fleet.least else "no worker: no job waits")
        return
    in_engine = "pid" if all(worker.engine_id is None for worker in found.workers) else "job"
    table = text.new_table("worker", "state", "host", f">{in_engine}", ">restarts", "why")
    for worker in found.workers:
        process = worker.engine_id or ("" if worker.pid is None else str(worker.pid))
        why = text.visible(worker.reason or "")
        table.add_row(worker.name, worker.state, worker.host or "", process, str(worker.restarts), why)
    text.print_table(table)
