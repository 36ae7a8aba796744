"""Continuing a prompt from recorded checkpoints, one or several, in one answer or as a stream."""

import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Body, Request, Response
from fastapi.sse import format_sse_event
from pydantic import BaseModel

from service.errors import Invalid, ServiceError
from service.generation.admission import Summary
from service.generation.messages import Chunk, EngineRequest
from service.http import problems, targets, views
from service.http.context import Context
from service.http.openapi import problems as documented
from service.http.openapi import ref
from service.http.routes import event_stream
from service.http.routes.client_disconnect import CLIENT_CLOSED_REQUEST, cancel_on_disconnect
from service.http.routes.event_stream import EventStream
from service.http.routes.parameters import Service
from service.http.routes.responses import as_json
from service.http.schemas import GenerateRequest, GenerateResponse, GenerateTargetsResponse
from service.http.targets import Gain, Target
from service.jobs.addressing import Address

router = APIRouter(tags=["generation"])

EXAMPLES = {
    "one": {
        "summary": "From one checkpoint",
        "value": {"job_id": "gato", "checkpoint": 100, "prompt": "Era uma vez", "temperature": 0},
    },
    "several": {
        "summary": "Side by side from several",
        "value": {
            "targets": [{"job_id": "gato", "checkpoint": 25}, {"job_id": "gato", "checkpoint": 100}],
            "prompt": "Era uma vez",
            "seed": 1,
        },
    },
}


@router.post(
    "/generate",
    summary="Continue a prompt",
    response_model=GenerateResponse | GenerateTargetsResponse,
    responses={
        200: {
            "description": "The continuations, with `targets` those of each; with `stream`, events `chunk`, for each "
            "target `end`, then `[DONE]`.",
            "content": {
                "application/json": {"schema": {"anyOf": [ref(GenerateResponse), ref(GenerateTargetsResponse)]}},
                **event_stream.documented(
                    "Events `chunk` (a `GenerateChunk`) and at the end of each target `end` (a `GenerateEnd`), then "
                    "`[DONE]`; `error` (a `Problem`) ends a stream that fails."
                ),
            },
        },
        **documented(400, 404, 409, 413, 415, 422, 429, 503),
    },
)
async def generate(
    service: Service, asked: Annotated[GenerateRequest, Body(openapi_examples=EXAMPLES)], connection: Request
) -> Response:
    """Continue a prompt, from one checkpoint or, side by side, from several. The same seed gives the same text,
    whatever else the service computes. With `targets`, all are answered or none."""
    _check_limit(service, asked)
    found = await to_thread.run_sync(targets.find_targets, service.database, asked)
    seed = secrets.randbits(63) if asked.seed is None else asked.seed
    is_alone = asked.targets is None
    continuing = [
        Target(
            service.generation,
            addresses,
            request_of=lambda address: _request(service, asked, seed, address),
            place=None if is_alone else n,
        )
        for n, addresses in enumerate(found)
    ]
    # No more continuations than the engine runs at the same time.
    at_once = max(1, service.settings.engine_max_running // asked.n)
    if not asked.stream:
        finished = await cancel_on_disconnect(connection, targets.finish_all(continuing, at_once=at_once))
        if finished is None:
            return CLIENT_CLOSED_REQUEST
        answers = [
            views.generated(address, asked.prompt, seed, result, n) for n, (address, result) in enumerate(finished)
        ]
        if is_alone:
            return as_json(answers[0])
        return as_json(GenerateTargetsResponse(prompt=asked.prompt, seed=seed, answers=answers))

    items = targets.continue_all(continuing, at_once=at_once)
    # The first item decides the status: once the answer has begun, it is too late for a 503.
    first = await cancel_on_disconnect(connection, anext(items))
    return CLIENT_CLOSED_REQUEST if first is None else EventStream(_events(seed, first, items))


def _check_limit(service: Context, asked: GenerateRequest) -> None:
    """Raises Invalid `too_many_tokens`: all targets together would be more than the engine may generate for one
    request. The limits of each are the engine's own to check."""
    settings = service.settings
    most = settings.engine_max_new_tokens * settings.engine_max_running
    n_tokens = len(asked.checkpoints) * asked.n * asked.max_new_tokens
    if asked.targets is not None and n_tokens > most:
        raise Invalid(
            "too_many_tokens",
            f"targets times n times max_new_tokens: {n_tokens:,}; this server's limit is {most:,}",
            errors=[{"loc": ["body", "targets"], "msg": "above the server's limit"}],
        )


def _request(service: Context, asked: GenerateRequest, seed: int, address: Address) -> EngineRequest:
    return EngineRequest(
        folder=(service.store / address.folder).location,
        manifest_sha256=address.manifest_sha256,
        prompt=asked.prompt,
        max_new_tokens=asked.max_new_tokens,
        sampling=asked,
        seed=seed,
        n=asked.n,
        stop=tuple(asked.stop),
        logprobs=asked.alternatives if asked.logprobs else None,
    )


async def _events(seed: int, first: Gain, items: AsyncGenerator[Gain]) -> AsyncIterator[bytes]:
    """The encoded events of the stream. Closing it cancels the generation."""
    async with aclosing(items):
        yield _event(seed, first)
        try:
            async for item in items:
                yield _event(seed, item)
        except ServiceError as error:
            yield format_sse_event(event="error", data_str=problems.of_service_error(error).model_dump_json())
            return
    yield format_sse_event(data_str="[DONE]")


def _event(seed: int, gain: Gain) -> bytes:
    kind: str
    data: BaseModel
    match gain.item:
        case Chunk():
            kind, data = "chunk", views.generate_chunk(gain.item, gain.target)
        case Summary():
            kind, data = "end", views.generate_end(gain.address, seed, gain.item, gain.target)
    return format_sse_event(event=kind, data_str=data.model_dump_json())
