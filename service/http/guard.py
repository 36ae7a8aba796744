"""Request admission: `Host`, `Origin` and the size of the body, checked before routing.

A page of another site must not be able to submit jobs to a local service, neither directly (`Origin`) nor through
a name that resolves to it (`Host`). Knows no key, and of the routes only which one takes weights.
"""

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import Forbidden, ServiceError, StartRefused, TooLarge
from service.http import problems
from service.loopback import is_loopback
from service.settings import Settings

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
MODELS_PATH = "/models"
"""The one route whose bodies are files of weights, with a limit of their own."""

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_OWN_SITE = frozenset({"same-origin", "none"})
"""Values of `Sec-Fetch-Site` of a request by this service's own pages, and of one that no page has made."""


def check_address(settings: Settings, *, has_keys: bool) -> None:
    """Refuse to listen on an address that other machines can reach, unless keys are asked for there or the settings
    allow it.

    Raises:
        StartRefused: the address is not loopback's, no key was ever made, and `allow_no_keys` is not set.
    """
    if not is_loopback(settings.host) and not has_keys and not settings.allow_no_keys:
        raise StartRefused(
            f"NANOMOE_HOST is {settings.host}, which other machines can reach, and there are no keys yet: anybody "
            "there could submit, read and delete jobs. Make one (nanomoe keys create NAME --role admin), use "
            "127.0.0.1, or, if access is restricted otherwise (a container port published on loopback, a proxy with a "
            "password), set NANOMOE_ALLOW_NO_KEYS=true"
        )


def _name_of(netloc: str) -> str | None:
    """The host name in `name:port` or `[::1]:port`, in lower case; None for a malformed one."""
    try:
        return urlsplit(f"//{netloc}").hostname
    except ValueError:
        return None


def _origins_of(host: str) -> tuple[str, str]:
    """The origins of a page from this `Host`, with http or https: TLS may end at a proxy."""
    return f"http://{host.lower()}", f"https://{host.lower()}"


class Guard:
    """ASGI middleware that refuses requests with a foreign `Host` or `Origin`, or with too large a body."""

    def __init__(self, app: ASGIApp, *, settings: Settings) -> None:
        self._app = app
        self._hosts = LOOPBACK_NAMES | {settings.host.lower(), *(host.lower() for host in settings.allowed_hosts)}
        # JSON may spell each byte of the text as an escape of six.
        self._max_body_bytes = 6 * settings.max_text_bytes + 1024 * 1024
        self._max_model_bytes = settings.max_model_bytes + self._max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer with a problem."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._max_model_bytes if scope["path"] == MODELS_PATH else self._max_body_bytes
        try:
            self._check(scope["method"], Headers(scope=scope), limit)
        except ServiceError as error:
            await problems.from_service_error(scope["path"], error)(scope, receive, send)
            return
        n_received = 0

        async def bounded_receive() -> Message:
            nonlocal n_received
            message = await receive()
            n_received += len(message.get("body", b""))
            if n_received > limit:
                raise HTTPException(413, _too_large(limit).detail)
            return message

        await self._app(scope, bounded_receive, send)

    def _check(self, method: str, headers: Headers, limit: int) -> None:
        host = headers.get("host", "")
        if _name_of(host) not in self._hosts:
            raise Forbidden(
                "host_not_allowed",
                f"this service does not answer to the Host '{host}'; NANOMOE_ALLOWED_HOSTS names others",
            )
        origin = headers.get("origin")
        if method not in _SAFE_METHODS:
            if origin is not None and origin.lower() not in _origins_of(host):
                raise Forbidden("origin_not_allowed", f"a page of '{origin}' must not change anything here")
            # A browser says where a request comes from even where it leaves the origin out.
            if origin is None and headers.get("sec-fetch-site", "none") not in _OWN_SITE:
                raise Forbidden("origin_not_allowed", "a page of another origin must not change anything here")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > limit:
            raise _too_large(limit)


def _too_large(limit: int) -> TooLarge:
    return TooLarge("body_too_large", f"a request body may have at most {limit:,} bytes")
