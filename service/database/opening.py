"""Opening the database that the settings name, SQLite or PostgreSQL."""

from sqlalchemy.engine import make_url

from service.database.change_notification import Changes
from service.database.database import Database
from service.database.folders import make_folder
from service.database.postgresql import open_postgresql
from service.database.sqlite import open_sqlite
from service.settings import Settings


def open_database(settings: Settings) -> Database:
    """Open the database that the settings name, creating the data folder and an empty SQLite file if need be.

    Neither migrates nor checks the schema: the API migrates (`service.database.migrate`), workers wait for it.
    Raises StartRefused for a network file system, a SQLite that is too old, a driver that is not installed, and a
    folder or a path that cannot be.
    """
    url = make_url(settings.database_url)
    make_folder(settings.data_dir)
    engine, source = open_sqlite(url) if url.get_backend_name() == "sqlite" else open_postgresql(url)
    return Database(engine, Changes(source))
