"""Connection settings of both clients: address, headers, time-outs, TLS and proxy."""

import os
import ssl
from importlib.util import find_spec
from typing import Any
from urllib.request import getproxies, proxy_bypass

import httpx

from nanomoe import __version__
from service.loopback import address_of, is_loopback

DEFAULT_URL = "http://127.0.0.1:8000"
"""Address of a service with default settings."""

URL_VARIABLE = "NANOMOE_URL"
"""Environment variable that holds the service's address."""


KEY_VARIABLE = "NANOMOE_KEY"
"""Environment variable that holds the key."""


def connection_settings(
    base_url: str, key: str | None, timeout: float, transport: httpx.BaseTransport | httpx.AsyncBaseTransport | None
) -> dict[str, Any]:
    """Keyword arguments of `httpx.Client` and `httpx.AsyncClient`.

    `key`: None is that of the environment, if it has one. Raises ValueError for a malformed address, for a key that a
    header cannot hold, and for a proxy in the environment that cannot be used.
    """
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ValueError(f"{base_url!r} is not an address: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"{base_url!r} is not an address: it must look like http://127.0.0.1:8000")
    headers = {"User-Agent": f"nanomoe/{__version__}"}
    key = (os.environ.get(KEY_VARIABLE, "") if key is None else key).strip()
    if key:
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"the key ({KEY_VARIABLE}) holds characters that no key has")  # without the key itself
        headers["Authorization"] = f"Bearer {key}"
    return {
        "base_url": url,
        "headers": headers,
        "timeout": httpx.Timeout(timeout, connect=5.0, write=60.0),
        "transport": transport,
        "verify": _certificates(url),
        # The proxy is chosen here: httpx would send loopback's requests, and the training text in them, through it.
        "trust_env": False,
        "proxy": _proxy_of(url) if transport is None else None,
    }


def _certificates(url: httpx.URL) -> ssl.SSLContext:
    """The TLS certificates, from SSL_CERT_FILE and SSL_CERT_DIR if set. None are loaded for http: that takes 20 ms."""
    return httpx.create_ssl_context() if url.scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _proxy_of(url: httpx.URL) -> httpx.Proxy | None:
    """The proxy for `url` in the environment; None where there is none or NO_PROXY excludes the host, and always for
    loopback. Raises ValueError for one that cannot be used."""
    address = address_of(url.host)
    if is_loopback(url.host) or (address is not None and address.is_unspecified):
        return None
    proxies = getproxies()
    kind = url.scheme if proxies.get(url.scheme) else "all"
    named = proxies.get(kind)
    if not named or any(proxy_bypass(host) for host in (url.host, url.netloc.decode())):
        return None
    variable = f"{kind.upper()}_PROXY"
    try:
        proxy = httpx.Proxy(named if "://" in named else f"http://{named}")
        usable = bool(proxy.url.host)
    except (ValueError, httpx.InvalidURL):
        usable = False
    if not usable:
        # Without the value, which may hold a password.
        raise ValueError(f"{variable} is not the address of an http, https, socks5 or socks5h proxy")
    if proxy.url.scheme.startswith("socks") and find_spec("socksio") is None:
        raise ValueError(
            f"{variable} names the {proxy.url.scheme} proxy of {url.host}, and socksio is not installed: "
            "pip install socksio, or name the host in NO_PROXY"
        )
    return proxy
