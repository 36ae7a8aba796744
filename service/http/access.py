"""Authorization: the one place that decides whether a request is answered, by `permissions.PERMISSIONS`.

It is decided before the body is read and before any route is called. What is not in that table is only there for an
admin, so that a new route is closed until somebody writes down who may use it.
"""

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from service.access.identity import Identity
from service.errors import Forbidden, NotFound, ServiceError, Unauthorized
from service.http import problems
from service.http.authentication import Authenticator, address_of
from service.http.permissions import ALLOWED, Permission, permissions_of

_IDENTITY = "nanomoe.identity"


class Authorization:
    """ASGI middleware that lets a request pass, or answers 401 or 403; tells the route who asks."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer with a problem."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no route is a WebSocket
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            identity = await _authorize(scope)
        except ServiceError as error:
            await problems.from_service_error(scope["path"], error)(scope, receive, send)
            return
        await self._app({**scope, _IDENTITY: identity}, receive, send)


async def _authorize(scope: Scope) -> Identity | None:
    """Who asks; None for somebody without a key, who asks for what is open.

    Raises Unauthorized, Forbidden `role_not_allowed`, NotFound `not_found`.
    """
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    permissions = permissions_of(scope["path"])
    permission = permissions.get(method, Permission.ADMIN)
    if permission is Permission.OPEN:
        return None
    authenticator: Authenticator = scope["app"].state.context.authenticator
    identity = await authenticator.identify(Headers(scope=scope), address_of(scope.get("client")))
    if permission is Permission.SESSION:
        return identity
    if identity is None:
        raise Unauthorized("key_required", "this service needs a key: Authorization: Bearer KEY")
    if identity.role in ALLOWED[permission] or (permissions and method == "OPTIONS"):
        return identity
    if not permissions:
        raise NotFound("not_found", f"there is no {scope['path']}")
    raise Forbidden("role_not_allowed", f"a {identity.role}'s key does not allow {method} here")


def identity_of(connection: HTTPConnection) -> Identity | None:
    """Who asks, as authorization found out. KeyError where it was passed by: nothing is answered then."""
    identity: Identity | None = connection.scope[_IDENTITY]
    return identity
