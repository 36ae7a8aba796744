"""Continuing a prompt from a recorded checkpoint, in one answer or as a stream."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import TypeVar

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from pydantic import BaseModel

from service import problems, store, views
from service.context import Context
from service.engine_messages import Chunk, EngineRequest
from service.errors import Conflict, NotFound, ServiceError
from service.generation import Summary
from service.openapi import problems as documented
from service.openapi import ref
from service.routes.parameters import Service
from service.schemas import GenerateRequest, GenerateResponse
from service.tables import Checkpoint

router = APIRouter(tags=["generation"])

T = TypeVar("T")

_CLIENT_IS_GONE = Response(status_code=499)
"""Nobody reads it; the number is what web servers write into their logs."""


@router.post(
    "/generate",
    response_model=GenerateResponse,
    responses={
        200: {
            "description": "The continuations; with `stream`, as events `chunk` and, at the end, `end`, then `[DONE]`.",
            "content": {
                "application/json": {"schema": ref(GenerateResponse)},
                "text/event-stream": {"schema": {"type": "string"}},
            },
        },
        **documented(400, 404, 409, 413, 422, 429, 503),
    },
)
async def generate(service: Service, asked: GenerateRequest, connection: Request) -> GenerateResponse | Response:
    """Continue a prompt. The same seed gives the same text, whoever else is being served."""
    row = await to_thread.run_sync(_find, service, asked)
    seed = secrets.randbits(63) if asked.seed is None else asked.seed
    request = EngineRequest(
        folder=str(service.settings.data_dir / row.folder),
        manifest_sha256=row.manifest_sha256,
        prompt=asked.prompt,
        max_new_tokens=asked.max_new_tokens,
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        seed=seed,
        n=asked.n,
        stop=tuple(asked.stop),
        logprobs=0 if asked.logprobs else None,
    )
    if asked.stream:
        items = service.generation.stream(request)
        # The first item decides the status: once the answer has begun, it is too late for a 503.
        first = await _unless_gone(connection, anext(items))
        if first is None:
            await items.aclose()
            return _CLIENT_IS_GONE
        return StreamingResponse(_events(row, seed, first, items), media_type="text/event-stream")
    result = await _unless_gone(connection, service.generation.generate(request))
    return _CLIENT_IS_GONE if result is None else views.generated(row, asked.prompt, seed, result)


def _find(service: Context, asked: GenerateRequest) -> Checkpoint:
    try:
        return store.get_checkpoint(service.database, asked.job_id, asked.checkpoint)
    except NotFound as error:
        if error.code == "checkpoint_not_found" and not store.list_checkpoints(service.database, asked.job_id):
            raise Conflict("no_checkpoint_yet", f"job {asked.job_id} has not recorded a checkpoint yet") from error
        raise


async def _unless_gone(connection: Request, work: Coroutine[None, None, T]) -> T | None:
    """The result of `work`; None, and `work` cancelled, when the client goes away before."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(connection))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait({working, leaving})


async def _gone(connection: Request) -> None:
    """Return when the client has closed the connection."""
    while (await connection.receive())["type"] != "http.disconnect":
        pass


async def _events(
    row: Checkpoint, seed: int, first: Chunk | Summary, items: AsyncGenerator[Chunk | Summary]
) -> AsyncIterator[bytes]:
    """The stream on the wire. Closing it cancels the generation."""
    async with aclosing(items):
        yield _event(row, seed, first)
        try:
            async for item in items:
                yield _event(row, seed, item)
        except ServiceError as error:
            yield format_sse_event(event="error", data_str=problems.of_service_error(error).model_dump_json())
            return
    yield format_sse_event(data_str="[DONE]")


def _event(row: Checkpoint, seed: int, item: Chunk | Summary) -> bytes:
    kind: str
    data: BaseModel
    if isinstance(item, Chunk):
        kind, data = "chunk", views.generate_chunk(item)
    else:
        kind, data = "end", views.generate_end(row, seed, item)
    return format_sse_event(event=kind, data_str=data.model_dump_json())
