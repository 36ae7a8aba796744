"""Signing a browser in with a key, and out again; who asks."""

from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Depends, Request, Response
from starlette.datastructures import Headers

from service.access import keys
from service.access.identity import ANYBODY, Identity
from service.errors import Conflict
from service.http.access import identity_of
from service.http.authentication import COOKIE, address_of, session_token
from service.http.context import Context
from service.http.openapi import problems
from service.http.routes.parameters import Service
from service.http.schemas import QuotaState, SessionView, SignInRequest
from service.jobs.quotas import usage_of

router = APIRouter(tags=["session"])

Asker = Annotated[Identity | None, Depends(identity_of)]
"""Who asks; None for somebody without a valid key."""


@router.get(
    "/session",
    summary="Find out who asks",
    response_description="Who the key or the cookie belongs to.",
    responses=problems(503),
)
def get_session(service: Service, identity: Asker) -> SessionView:
    """Whether a key is needed at all; with a key or signed in, whose it is and what is left of the owner's quotas."""
    return _view(service, identity)


@router.post(
    "/session",
    summary="Sign a browser in",
    response_description="The browser is signed in: the cookie is set.",
    responses=problems(400, 409, 413, 415, 422, 503, 507),
)
async def create_session(service: Service, asked: SignInRequest, request: Request, response: Response) -> SessionView:
    """Exchange a key for a cookie that pages of this service send, and no script can read."""
    if not await service.authenticator.keys_are_required():
        raise Conflict("no_keys", "no key was ever made here: none is needed")
    identity, token = await service.authenticator.with_key(
        address_of(request.scope.get("client")), keys.sign_in, asked.key
    )
    response.set_cookie(
        COOKIE,
        token,
        max_age=keys.SIGN_IN_SECONDS,
        httponly=True,
        samesite="strict",
        secure=_is_encrypted(request),
    )
    return await to_thread.run_sync(_view, service, identity)


@router.delete(
    "/session",
    summary="Sign a browser out",
    response_description="The browser is signed out: its cookie is no longer valid.",
    status_code=204,
    responses=problems(503, 507),
)
async def delete_session(service: Service, request: Request, response: Response) -> None:
    """End the sign-in of the cookie. Harmless without one."""
    if (token := session_token(Headers(scope=request.scope))) is not None:
        await to_thread.run_sync(keys.sign_out, service.database, token)
    response.delete_cookie(COOKIE, httponly=True, samesite="strict", secure=_is_encrypted(request))


def _view(service: Context, identity: Identity | None) -> SessionView:
    if identity is None:
        return SessionView(key_required=True, owner=None, role=None)
    if identity == ANYBODY:
        return SessionView(key_required=False, owner=None, role=identity.role)
    quotas = [
        QuotaState(name=name, limit=limit, used=used, left=max(0, limit - used))
        for name, limit, used in usage_of(service.database, identity.owner)
    ]
    return SessionView(key_required=True, owner=identity.owner, role=identity.role, quotas=quotas)


def _is_encrypted(request: Request) -> bool:
    """Whether the browser came by TLS, which may end at a proxy: the `Origin` of its page says so, too."""
    return request.url.scheme == "https" or request.headers.get("origin", "").lower().startswith("https://")
