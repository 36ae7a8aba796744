"""Continuing a prompt from a recorded checkpoint, in one answer or as a stream."""

import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from fastapi.sse import format_sse_event
from pydantic import BaseModel

from service.errors import ServiceError
from service.generation.admission import Summary
from service.generation.messages import Chunk, EngineRequest
from service.http import problems, views
from service.http.context import Context
from service.http.openapi import problems as documented
from service.http.openapi import ref
from service.http.routes import event_stream
from service.http.routes.client_disconnect import CLIENT_CLOSED_REQUEST, cancel_on_disconnect
from service.http.routes.event_stream import EventStream
from service.http.routes.parameters import Service
from service.http.routes.responses import as_json
from service.http.schemas import GenerateRequest, GenerateResponse
from service.jobs.addressing import Address, find_checkpoints, first_undamaged

router = APIRouter(tags=["generation"])


@router.post(
    "/generate",
    summary="Continue a prompt",
    response_model=GenerateResponse,
    responses={
        200: {
            "description": "The continuations; with `stream`, events `chunk`, then `end`, then `[DONE]`.",
            "content": {
                "application/json": {"schema": ref(GenerateResponse)},
                **event_stream.documented(
                    "Events `chunk` (a `GenerateChunk`) and at the end `end` (a `GenerateEnd`), then `[DONE]`; "
                    "`error` (a `Problem`) ends a stream that fails."
                ),
            },
        },
        **documented(400, 404, 409, 413, 415, 422, 429, 503),
    },
)
async def generate(service: Service, asked: GenerateRequest, connection: Request) -> Response:
    """Continue a prompt. The same seed gives the same text, whatever else the service computes."""
    addresses = await to_thread.run_sync(find_checkpoints, service.database, asked.job_id, asked.checkpoint)
    seed = secrets.randbits(63) if asked.seed is None else asked.seed
    if not asked.stream:
        whole = first_undamaged(addresses, lambda one: service.generation.generate(_request(service, asked, seed, one)))
        generated = await cancel_on_disconnect(connection, whole)
        if generated is None:
            return CLIENT_CLOSED_REQUEST
        address, result = generated
        return as_json(views.generated(address, asked.prompt, seed, result))

    async def begin(address: Address) -> tuple[Chunk | Summary, AsyncGenerator[Chunk | Summary]]:
        items = service.generation.stream(_request(service, asked, seed, address))
        # The first item decides the status: once the answer has begun, it is too late for a 503.
        return await anext(items), items

    begun = await cancel_on_disconnect(connection, first_undamaged(addresses, begin))
    if begun is None:
        return CLIENT_CLOSED_REQUEST
    address, (first, items) = begun
    return EventStream(_events(address, seed, first, items))


def _request(service: Context, asked: GenerateRequest, seed: int, address: Address) -> EngineRequest:
    return EngineRequest(
        folder=str(service.settings.data_dir / address.folder),
        manifest_sha256=address.manifest_sha256,
        prompt=asked.prompt,
        max_new_tokens=asked.max_new_tokens,
        sampling=asked,
        seed=seed,
        n=asked.n,
        stop=tuple(asked.stop),
        logprobs=0 if asked.logprobs else None,
    )


async def _events(
    address: Address, seed: int, first: Chunk | Summary, items: AsyncGenerator[Chunk | Summary]
) -> AsyncIterator[bytes]:
    """The encoded events of the stream. Closing it cancels the generation."""
    async with aclosing(items):
        yield _event(address, seed, first)
        try:
            async for item in items:
                yield _event(address, seed, item)
        except ServiceError as error:
            yield format_sse_event(event="error", data_str=problems.of_service_error(error).model_dump_json())
            return
    yield format_sse_event(data_str="[DONE]")


def _event(address: Address, seed: int, item: Chunk | Summary) -> bytes:
    kind: str
    data: BaseModel
    if isinstance(item, Chunk):
        kind, data = "chunk", views.generate_chunk(item)
    else:
        kind, data = "end", views.generate_end(address, seed, item)
    return format_sse_event(event=kind, data_str=data.model_dump_json())
