"""Signing in, and who asks."""

from pydantic import Field

from nanomoe.config import Strict
from service.access.roles import Role
from service.http.patterns import PRINTABLE
from service.http.schemas.base import QuotaState, View


class SignInRequest(Strict):
    """The body of `POST /session`."""

    key: str = Field(min_length=1, max_length=200, pattern=PRINTABLE)
    """Key that signs the browser in."""


class SessionView(View):
    """The answer of `/session`: whether keys are needed, and the owner and role of the one that was sent."""

    key_required: bool
    """Whether the service has keys: without one, only its open routes are answered."""

    owner: str | None
    """Owner of the key; null without a valid one, and where there are no keys."""

    role: Role | None
    """Role of the key; null without a valid one. Where there are no keys, everybody is `admin`."""

    quotas: list[QuotaState] = Field(default_factory=list)
    """Quotas of the key's owner, and how far they are used; what has no limit is not listed."""
