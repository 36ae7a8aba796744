"""Where the service is, and what to type so that a command reaches it from any terminal."""

import os
import shlex
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from service.cli import text
from service.cli.mistakes import Mistake
from service.client.connection import DEFAULT_URL, URL_VARIABLE
from service.errors import StartRefused
from service.loopback import is_loopback

if TYPE_CHECKING:
    from service.settings import Settings

_TO_CONNECT_TO = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - read, not bound
"""An address that stands for all of this machine's -> the one of loopback."""


def settings() -> "Settings":
    """The environment's settings; a wrong one is a usage error that names its variable."""
    from service.settings import read_settings  # not needed by a command that is told where the service is

    try:
        return read_settings()
    except StartRefused as error:
        raise Mistake(str(error).replace("\n", "; ")) from None


def own_url() -> str:
    """Where a command looks that is not told: at NANOMOE_URL, or where a service with these settings listens.

    Raises Mistake.
    """
    if named := os.environ.get(URL_VARIABLE):
        return named.rstrip("/")
    here = settings()
    host = _TO_CONNECT_TO.get(here.host, here.host)
    return f"http://[{host}]:{here.port}" if ":" in host else f"http://{host}:{here.port}"


def option_for(url: str) -> str:
    """The option with which a command finds the service at `url`, from any terminal; empty if it needs none."""
    return "" if url == DEFAULT_URL == own_url() else f" --url {shlex.quote(url)}"


def how_to_reach(url: str) -> str:
    """What to do when nobody answers at `url`."""
    parts = urlsplit(url)
    told = " or --url"
    if parts.hostname is None or not is_loopback(parts.hostname):
        return told
    port = parts.port or 80
    is_own = url == own_url() and URL_VARIABLE not in os.environ
    return f"{told}; start the service with: {text.program()} serve{'' if is_own else f' --port {port}'}"
