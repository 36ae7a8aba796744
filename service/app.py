"""The REST API: its routes, middleware and background tasks. Loads no torch."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from starlette.requests import ClientDisconnect

import nanomoe
from service.http import openapi, problems
from service.http.access import Authorization
from service.http.context import open_context
from service.http.guard import Guard
from service.http.head import HeadAsGet
from service.http.request_body import RequestBody
from service.http.routes import (
    checkpoints,
    client_disconnect,
    compare,
    docs,
    events,
    examine,
    generate,
    jobs,
    many_events,
    metrics,
    models,
    openai,
    page,
    presets,
    session,
    sweeps,
    system,
)
from service.http.static_files import PageFiles
from service.settings import Settings

_DESCRIPTION = """
Train very small language models on your own machine, and inspect them while they learn.

`POST /jobs {"text": "..."}` runs the reference run; every knob of `config` changes one aspect of it.
Errors are `application/problem+json` with a stable `code`; under `/v1` they have OpenAI's shape.
`HEAD` works wherever `GET` does. A body is JSON in UTF-8 or a form, and not compressed.
"""


def create_app(settings: Settings) -> FastAPI:
    """The API. Its database is opened when the app starts, and closed when it stops."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_context(settings) as app.state.context:
            yield

    app = FastAPI(
        title="nanomoe",
        version=nanomoe.__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,  # a route of its own, compressed
        # `/jobs/` is not `/jobs`; a redirect would also drop the body of a POST.
        redirect_slashes=False,
        # Generated clients name their functions after these: to rename a route's function breaks them.
        generate_unique_id_function=lambda route: route.name,
    )
    # The last one added handles a request first.
    app.add_middleware(RequestBody)
    app.add_middleware(HeadAsGet)
    app.add_middleware(Authorization)
    app.add_middleware(Guard, settings=settings)
    problems.install(app)
    app.add_exception_handler(events.StreamEnded, events.stream_ended)
    app.add_exception_handler(ClientDisconnect, client_disconnect.disconnected_during_upload)
    for part in (
        jobs,
        models,
        sweeps,
        compare,
        presets,
        metrics,
        events,
        many_events,
        checkpoints,
        generate,
        examine,
        openai,
        session,
        system,
        docs,
    ):
        app.include_router(part.router)
    if settings.page:
        app.include_router(page.router)
    app.mount("/static", PageFiles())
    app.openapi = partial(openapi.document, app)  # type: ignore[method-assign]
    return app
