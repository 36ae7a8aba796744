"""Options that the engines of SQLite and PostgreSQL have in common."""

import json
from typing import Any

LOCK_TIMEOUT_SECONDS = 10.0
"""How long a transaction waits for another process's lock, or for a connection of the pool, before it fails."""

WRITES = {"writes": True}
"""Execution options of a connection whose transactions write."""


def to_json(value: Any) -> str:
    """A value of a JSON column as it is stored; ValueError for NaN and infinity."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
