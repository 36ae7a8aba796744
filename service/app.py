"""The REST API: its routes, its middleware and what it runs beside them. Loads no torch."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from starlette.requests import ClientDisconnect

import nanomoe
from service.http import openapi, problems
from service.http.context import open_context
from service.http.guard import Guard, check_address
from service.http.head import HeadAsGet
from service.http.request_body import RequestBody
from service.http.routes import (
    checkpoints,
    client_disconnect,
    docs,
    events,
    examine,
    generate,
    jobs,
    metrics,
    openai,
    system,
)
from service.settings import Settings

_DESCRIPTION = """
Train very small language models on your own machine, and look inside while they learn.

`POST /jobs {"text": "..."}` runs the reference run; every knob of `config` changes one thing of it.
Errors are `application/problem+json` with a stable `code`; under `/v1` they have OpenAI's shape.
`HEAD` works wherever `GET` does. A body is JSON in UTF-8 or a form, and not compressed.
"""


def create_app(settings: Settings) -> FastAPI:
    """The API. Its database is opened when the app starts, and closed when it stops.

    Raises:
        StartRefused: it would serve other machines without keys.
    """
    check_address(settings)

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
        # `/jobs/` is not `/jobs`; a redirect would also drop the body of a POST.
        redirect_slashes=False,
        # Generated clients name their functions after these: to rename a route's function breaks them.
        generate_unique_id_function=lambda route: route.name,
    )
    # The last is the first that a request meets.
    app.add_middleware(RequestBody)
    app.add_middleware(HeadAsGet)
    app.add_middleware(Guard, settings=settings)
    problems.install(app)
    app.add_exception_handler(events.NothingMore, events.nothing_more)
    app.add_exception_handler(ClientDisconnect, client_disconnect.left_while_sending)
    for part in (jobs, metrics, events, checkpoints, generate, examine, openai, system, docs):
        app.include_router(part.router)
    app.mount("/static", StaticFiles(directory=docs.STATIC))
    app.openapi = partial(openapi.document, app)  # type: ignore[method-assign]
    return app
