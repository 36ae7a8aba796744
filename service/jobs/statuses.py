"""The statuses of a job. Loads nothing, so that the client may share them."""

from typing import Literal, get_args

TerminalStatus = Literal["succeeded", "failed", "cancelled"]
"""A status that a job never leaves."""

Status = Literal["queued", "running", "paused", TerminalStatus]

STATUSES: tuple[Status, ...] = get_args(Status)
TERMINAL: tuple[TerminalStatus, ...] = get_args(TerminalStatus)
