"""Who a request comes from."""

from dataclasses import dataclass

from service.access.roles import Role
from service.database.caller import Caller


@dataclass(frozen=True)
class Identity:
    """Who a request comes from."""

    owner: str
    """Owner of the key; empty where no keys are used."""

    role: Role
    key_id: str | None
    """Id of the key; None where no keys are used."""

    @property
    def caller(self) -> Caller:
        """On whose behalf the request's queries are made."""
        return Caller(self.owner, sees_all=self.role == "admin", key_id=self.key_id)


ANYBODY = Identity("", "admin", None)
"""Whoever reaches a service for which no key was ever made."""
