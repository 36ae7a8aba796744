"""`python -m worker`: flags, logging and signals of the supervisor."""

import argparse
import gc
import math
import platform
import signal
import sys
from contextlib import closing

from nanomoe.logs import configure_logging
from service.database.opening import open_database
from service.errors import DatabaseUnavailable, StartRefused
from service.jobs.workers import is_alive, list_workers
from service.settings import Settings, read_settings
from worker.devices import find_devices
from worker.supervisor import TRAINER, Supervisor


def main(arguments: list[str] | None = None) -> int:
    """Run a worker until SIGTERM or SIGINT, or until it has been idle for long enough; a second signal ends it at once.

    Returns the exit status: 2 when settings or machine forbid the start, 1 when trying again may help.
    """
    options = _parser().parse_args(arguments)
    given = {name: value for name, value in vars(options).items() if value is not None}
    slots, name, healthy = given.pop("slots", 1), given.pop("name", None), given.pop("healthy")
    idle_seconds, parent = given.pop("idle_seconds", None), given.pop("parent", None)
    try:
        settings = read_settings(**given)
        configure_logging(settings.log_format)
        if healthy:
            return 0 if is_healthy(settings) else 1
        trainer = (*TRAINER, "--log-format", settings.log_format)
        devices = find_devices(settings.device)
        with closing(open_database(settings)) as db:
            supervisor = Supervisor(
                db,
                devices,
                settings,
                slots=slots,
                name=name,
                command=trainer,
                idle_seconds=idle_seconds,
                parent=parent,
            )
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, supervisor.stop)
            # What is there now stays: a search of it for what is unreachable would hold up messages by 0.1 s.
            gc.collect()
            gc.freeze()
            return supervisor.run()
    except StartRefused as error:
        print(error, file=sys.stderr)
        if parent is not None:
            print(error, flush=True)  # the one thing that it tells its starter
        return 2
    except DatabaseUnavailable as error:
        print(error, file=sys.stderr)
        return 1


def is_healthy(settings: Settings) -> bool:
    """Whether a worker of this host is alive: a container's check."""
    with closing(open_database(settings)) as db:
        now = db.time()
        here = [worker for worker, _ in list_workers(db) if worker.host == platform.node()]
    return any(is_alive(worker, now) for worker in here)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m worker", description="Claims jobs and trains them. Flags win over NANOMOE_... variables."
    )
    parser.add_argument("--devices", dest="device", help="where to train: auto, cpu, cuda:0,cuda:1 ...")
    parser.add_argument("--slots", type=_positive, help="jobs at once on each device (1)")
    parser.add_argument("--name", help="stable name of this worker (the host's)")
    parser.add_argument("--idle-seconds", type=_seconds, help="end after this long without a job (never)")
    parser.add_argument("--parent", type=_positive, help="process id of the starter: stop when it has ended")
    parser.add_argument("--healthy", action="store_true", help="exit with 0 if a worker of this host is alive, else 1")
    parser.add_argument("--data-dir", help="folder of the job files")
    parser.add_argument("--database-url", help="sqlite:///PATH or postgresql+psycopg://...")
    parser.add_argument("--lease-seconds", type=float, help="seconds after which a job without a heartbeat is rescued")
    parser.add_argument("--heartbeat-seconds", type=float, help="seconds between heartbeats")
    parser.add_argument("--snapshot-seconds", type=float, help="seconds between rolling snapshots")
    parser.add_argument("--log-format", choices=["console", "json"], help="format of the log lines")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError("must be a number above 0")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
