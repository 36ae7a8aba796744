"""What both clients tell httpx."""

from typing import Any

import httpx

from nanomoe import __version__


def connection_settings(base_url: str, key: str | None, timeout: float) -> dict[str, Any]:
    """Keyword arguments of `httpx.Client` and `httpx.AsyncClient`; raises ValueError for an address that is none."""
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ValueError(f"{base_url!r} is not an address: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"{base_url!r} is not an address: it must look like http://127.0.0.1:8000")
    headers = {"User-Agent": f"nanomoe/{__version__}"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    return {"base_url": url, "headers": headers, "timeout": httpx.Timeout(timeout, connect=5.0, write=60.0)}
