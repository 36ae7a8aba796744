"""The service's address, and the options with which a command reaches it."""

import os
import shlex
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from service.cli import text
from service.cli.usage_error import UsageError
from service.client.connection import DEFAULT_URL, URL_VARIABLE
from service.errors import StartRefused
from service.loopback import is_loopback

if TYPE_CHECKING:
    from service.settings import Settings

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - read, not bound
"""Wildcard address -> loopback address to connect to."""


def settings() -> "Settings":
    """The environment's settings; a wrong one is a usage error that names its variable."""
    from service.settings import read_settings  # not needed by a command with --url

    try:
        return read_settings()
    except StartRefused as error:
        raise UsageError(str(error).replace("\n", "; ")) from None


def own_url() -> str:
    """Default address of the service: NANOMOE_URL, or where a service with this environment's settings listens.

    Raises UsageError.
    """
    if named := os.environ.get(URL_VARIABLE):
        return named.rstrip("/")
    here = settings()
    host = _WILDCARDS.get(here.host, here.host)
    return f"http://[{host}]:{here.port}" if ":" in host else f"http://{host}:{here.port}"


def option_for(url: str) -> str:
    """The option with which a command in any terminal reaches `url`; empty if it needs none."""
    return "" if url == DEFAULT_URL == own_url() else f" --url {shlex.quote(url)}"


def how_to_reach(url: str) -> str:
    """Advice when nothing answers at `url`."""
    parts = urlsplit(url)
    advice = " or --url"
    if parts.hostname is None or not is_loopback(parts.hostname):
        return advice
    port = parts.port or 80
    is_own = url == own_url() and URL_VARIABLE not in os.environ
    return f"{advice}; start the service with: {text.program()} serve{'' if is_own else f' --port {port}'}"
