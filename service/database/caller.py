"""On whose behalf a database is read and changed. Knows no table, no key and no HTTP."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """The owner of what a database handle adds, and of all that it shows unless it shows everything."""

    owner: str = ""
    """Owner of the jobs that are submitted; empty where no keys are used."""

    sees_all: bool = True
    """Whether other owners' jobs are there, too."""

    key_id: str | None = None
    """Key that authenticated the caller; its changes are audited. None for a process of this service."""


PROCESS = Caller()
"""A process of this service, or anybody where no keys are used: everything is there, and nothing is audited."""
