"""PostgreSQL: an engine whose connections notice within half a minute that the server is gone."""

from functools import partial

import sqlalchemy as sa
from sqlalchemy.engine import URL, Engine

from service.database import engine_options
from service.database.change_notification import Source, listen_to_postgresql
from service.errors import StartRefused


def open_postgresql(url: URL) -> tuple[Engine, Source]:
    """An engine for a PostgreSQL server, and the source of its change notifications. Connects only when it is used.

    Raises StartRefused when the driver is not installed.
    """
    try:
        engine = sa.create_engine(
            url,
            json_serializer=engine_options.to_json,
            pool_size=8,
            max_overflow=8,
            pool_timeout=engine_options.LOCK_TIMEOUT_SECONDS,
            pool_pre_ping=True,
            connect_args={
                "connect_timeout": 5,
                "keepalives_idle": 10,
                "keepalives_interval": 5,
                "keepalives_count": 3,
                "tcp_user_timeout": 15_000,
                "options": "-c statement_timeout=60s -c lock_timeout=10s -c idle_in_transaction_session_timeout=60s",
            },
        )
    except ModuleNotFoundError as error:
        raise StartRefused("PostgreSQL needs the driver: pip install 'nanomoe[postgres]'") from error
    return engine, partial(listen_to_postgresql, engine)
