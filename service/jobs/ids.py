"""Ids of jobs and sweeps: random, and sortable within one process. Their shape is `nanomoe.config.JOB_ID_PATTERN`."""

import os
import threading
import time
from typing import Any

import sqlalchemy as sa

_last_id = 0
_id_lock = threading.Lock()


def new_id() -> str:
    """A UUIDv7 (RFC 9562, 32 hex digits), strictly increasing within this process, so that an index of ids grows at its
    end. Ids do not order jobs, since clocks are set back and two processes differ: `Job.seq` does."""
    global _last_id
    with _id_lock:
        milliseconds, nanoseconds = divmod(time.time_ns(), 1_000_000)
        stamp = milliseconds << 12 | (nanoseconds << 12) // 1_000_000
        _last_id = max(stamp, _last_id + 1)
        stamp = _last_id
    random = int.from_bytes(os.urandom(8)) >> 2
    return f"{(stamp >> 12) << 80 | 0x7 << 76 | (stamp & 0xFFF) << 64 | 0b10 << 62 | random:032x}"


def begins_with(column: "sa.Column[Any]", prefix: str) -> sa.ColumnElement[bool]:
    """The condition that an id begins with `prefix`, hexadecimal digits."""
    # A range, which the index of ids serves in every collation: no hexadecimal digit comes after g.
    return column.between(prefix, f"{prefix}g")
