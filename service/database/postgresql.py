"""PostgreSQL: an engine whose connections notice within ten seconds, on either side, that the other one is gone.

A host that has lost its power, or a network that drops what is sent, closes no connection: without the settings here
its other end would be waited for, and the locks of a transaction be held, for minutes to hours.
"""

from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, Engine

from service.database import engine_options
from service.database.change_notification import Source, listen_to_postgresql
from service.errors import StartRefused

CONNECT_SECONDS = 5
"""Longest wait for a new connection, of each address of the server."""

SILENCE_SECONDS = 7
"""How long the other end may say nothing that it was asked for before the connection counts as broken, two seconds more
where nothing was asked: less than a transaction waits for a lock, so that nobody fails because of the locks of a host
that was lost; and so much less than a lease that a heartbeat can be made again."""

_IDLE_SECONDS, _INTERVAL_SECONDS, _PROBES = 2, 2, 3
"""After how long without a packet a connection is asked for a sign of life, how often then, and how many times."""


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
            connect_args=_connection_options(),
        )
    except ModuleNotFoundError as error:
        raise StartRefused("PostgreSQL needs the driver: pip install 'nanomoe[postgres]'") from error
    arguments, options = engine.dialect.create_connect_args(url)
    connect = partial(engine.dialect.connect, *arguments, **{**options, **_connection_options()}, autocommit=True)
    return engine, partial(listen_to_postgresql, connect)


def _connection_options() -> dict[str, Any]:
    """The options of every connection: what the kernel of this side watches for, and what the server does. A socket of
    one machine is not watched."""
    of_server = {
        "statement_timeout": "60s",
        "lock_timeout": f"{engine_options.LOCK_TIMEOUT_SECONDS:g}s",
        "idle_in_transaction_session_timeout": "60s",
        "tcp_keepalives_idle": _IDLE_SECONDS,
        "tcp_keepalives_interval": _INTERVAL_SECONDS,
        "tcp_keepalives_count": _PROBES,
        "tcp_user_timeout": SILENCE_SECONDS * 1000,
    }
    return {
        "connect_timeout": CONNECT_SECONDS,
        "keepalives_idle": _IDLE_SECONDS,
        "keepalives_interval": _INTERVAL_SECONDS,
        "keepalives_count": _PROBES,
        "tcp_user_timeout": SILENCE_SECONDS * 1000,
        "options": " ".join(f"-c {name}={value}" for name, value in of_server.items()),
    }
