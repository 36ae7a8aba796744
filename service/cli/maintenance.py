"""`nanomoe backup` and `nanomoe fsck`: maintenance of the database and the data folder of this machine.

They open both themselves, so they need no service, and do not disturb one that runs. The database's modules are
imported only when one of them runs.
"""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from service.cli import text
from service.cli.addresses import settings
from service.cli.database import opened_database
from service.cli.jobs import FAILED
from service.cli.output import Json, print_json
from service.cli.usage_error import UsageError
from service.settings import Settings

if TYPE_CHECKING:
    from service.database.database import Database
    from service.storage.fsck import Report


def backup(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The copy of the database to write, which must not exist.")
    ],
) -> None:
    """Copy the database while the service runs, and print which files a backup needs too."""
    here = settings()
    if not here.database_url.startswith("sqlite:"):
        print(_pg_dump(here.database_url, file))
        files = here.store or here.data_dir / "jobs"
        raise UsageError(
            "nothing was written: run the command above, which copies a PostgreSQL database; the files of the jobs, in "
            f"{files}, are copied before it and once more after it"
        )
    with _opened(here) as database:
        database.backup(file)
    text.console().print(f"wrote {file}")
    _show_what_else_to_copy(here, file)


def _show_what_else_to_copy(here: Settings, file: Path) -> None:
    console = text.console(stderr=True)
    if here.store is not None:
        console.print(f"The files of the jobs are not in it: they lie in {here.store}.", style=text.DIM)
        console.print("Copy that with a tool of your store, before the database and once more now.", style=text.DIM)
        return
    data, to = shlex.quote(str(here.data_dir)), shlex.quote(str(file.absolute().parent))
    console.print("The files of the jobs are not in it. Copy them before it, and once more now:", style=text.DIM)
    console.print(f"  cp -a {data}/installation {data}/jobs {to}/", style=text.DIM)


def _pg_dump(database_url: str, file: Path) -> str:
    """The command that copies a PostgreSQL database, without the password: pg_dump asks for it, or reads ~/.pgpass."""
    from sqlalchemy.engine import make_url

    url = make_url(database_url)._replace(drivername="postgresql", password=None)
    return shlex.join(["pg_dump", "--format=custom", f"--file={file}", f"--dbname={url.render_as_string()}"])


def fsck(
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Remove files without a row now; a worker removes them after a day.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Verify every recorded checkpoint and snapshot against its files, byte for byte.

    Exit code 0: every file is as recorded; 1: a file is missing or damaged.
    """
    from service.storage.fsck import check
    from service.storage.opening import REQUEST_RETRY_SECONDS, open_store
    from service.storage.orphans import sweep_orphans

    here = settings()
    with _opened(here) as database:
        store = open_store(here, retry_seconds=REQUEST_RETRY_SECONDS)
        report = check(database, store)
        swept = None
        if sweep and not any(fault.kind == "installation" for fault in report.faults):
            swept = sweep_orphans(database, store, older_than=timedelta(0))
    if as_json:
        print_json({"clean": report.is_clean} | asdict(report) | {"swept": swept})
    else:
        _show(report, swept)
    if not report.is_clean:
        raise typer.Exit(FAILED)


@contextmanager
def _opened(here: Settings) -> "Iterator[Database]":
    """The database, which must exist; its errors are usage errors."""
    from sqlalchemy.engine import make_url

    if here.database_url.startswith("sqlite:"):
        file = Path(make_url(here.database_url).database or "")
        if not file.is_file():
            raise UsageError(f"there is no database {file}; check NANOMOE_DATA_DIR and NANOMOE_DATABASE_URL")
    with opened_database(here) as database:
        yield database


def _show(report: "Report", swept: list[str] | None) -> None:
    console = text.console()
    for fault in report.faults:
        job = f"job {fault.job_id}: " if fault.job_id is not None else ""
        console.print(Text.assemble((fault.kind, text.WRONG), f"  {job}{text.visible(fault.message)}"))
    for path in report.orphans if swept is None else swept:
        console.print(Text.assemble(("no row" if swept is None else "removed", text.DIM), f"  {path}"))
    read = f"{report.n_checkpoints:,} checkpoints and {report.n_snapshots:,} snapshots, {report.n_bytes / 1e6:,.1f} MB"
    wrong = "all as recorded" if report.is_clean else f"{len(report.faults):,} wrong"
    console.print(f"{read}: {wrong}", style=text.GOOD if report.is_clean else text.WRONG)
    if report.orphans and swept is None:
        console.print(f"{len(report.orphans):,} without a row, which a worker removes after a day", style=text.DIM)
