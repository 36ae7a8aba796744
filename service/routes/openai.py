"""The OpenAI shapes: programs written for OpenAI's completions work with recorded checkpoints as their models."""

import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any
from uuid import uuid4

from anyio import to_thread
from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event

from service import addressing, problems, schemas
from service.addressing import MODEL_ID_PATTERN, Address, first_whole
from service.context import Context
from service.engine_messages import Chunk, EngineRequest
from service.errors import Invalid, NotFound, ServiceError
from service.generation import Summary
from service.openai_choices import ChoiceWriter
from service.openapi import openai_errors, ref
from service.routes.leaving import CLIENT_IS_GONE, unless_gone
from service.routes.parameters import Service
from service.routes.responses import as_json
from service.schemas import Completion, CompletionRequest, Model, ModelList

router = APIRouter(prefix="/v1", tags=["openai"])

MAX_TOKENS = 16
"""What OpenAI's completions add unless told otherwise."""

_HEADER_SAFE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_IGNORED = 20


@router.post(
    "/completions",
    response_model=Completion,
    responses={
        200: {
            "description": "The continuations; with `stream`, as chunks of the same shape, then `[DONE]`.",
            "headers": {"X-Ignored": {"description": "Fields that had no effect.", "schema": {"type": "string"}}},
            "content": {
                "application/json": {"schema": ref(Completion)},
                "text/event-stream": {"schema": {"type": "string"}},
            },
        },
        **openai_errors(400, 404, 409, 413, 422, 429, 503),
    },
)
async def complete(service: Service, asked: CompletionRequest, connection: Request) -> Response:
    """Continue a prompt, as OpenAI's legacy completions do."""
    if asked.echo and asked.logprobs is not None:
        raise Invalid(
            "echo_with_logprobs",
            "the prompt's own log-probabilities are not among logprobs here; POST /score tells them",
            errors=[{"loc": ["body", "echo"], "msg": "not together with logprobs"}],
        )
    max_tokens = MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
    limit = service.settings.engine_max_new_tokens
    if max_tokens > limit:
        raise Invalid(
            "max_tokens_too_large",
            f"max_tokens is {max_tokens}; this server's limit is {limit}",
            errors=[{"loc": ["body", "max_tokens"], "msg": "above the server's limit"}],
        )
    addresses = await to_thread.run_sync(addressing.find_models, service.database, asked.model)

    def ask(address: Address) -> tuple[_Answer, AsyncGenerator[Chunk | Summary]]:
        request = _request(service, asked, max_tokens, address)
        return _Answer(address, asked, request.n), service.generation.stream(request, in_chunks=bool(asked.stream))

    async def finish(address: Address) -> Completion:
        answer, items = ask(address)
        return await answer.whole(items)

    async def begin(address: Address) -> tuple[_Answer, Chunk | Summary, AsyncGenerator[Chunk | Summary]]:
        answer, items = ask(address)
        # The first item decides the status: once the answer has begun, it is too late for a 503.
        return answer, await anext(items), items

    headers = _ignored(asked)
    if not asked.stream:
        finished = await unless_gone(connection, first_whole(addresses, finish))
        return CLIENT_IS_GONE if finished is None else as_json(finished[1], headers)
    begun = await unless_gone(connection, first_whole(addresses, begin))
    if begun is None:
        return CLIENT_IS_GONE
    return StreamingResponse(_events(*begun[1]), headers=headers, media_type="text/event-stream")


def _request(service: Context, asked: CompletionRequest, max_tokens: int, address: Address) -> EngineRequest:
    return EngineRequest(
        folder=str(service.settings.data_dir / address.folder),
        manifest_sha256=address.manifest_sha256,
        prompt=asked.prompt,
        max_new_tokens=max_tokens,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        seed=secrets.randbits(63) if asked.seed is None else asked.seed,
        n=1 if asked.n is None else asked.n,
        stop=asked.stops,
        logprobs=asked.logprobs,
    )


@router.get("/models", responses=openai_errors(503))
def list_models(service: Service) -> ModelList:
    """The recorded checkpoints, those of the newest jobs first, at most 1,000."""
    return ModelList(data=[_model(address) for address in addressing.list_models(service.database)])


@router.get("/models/{model}", responses=openai_errors(404, 503))
def get_model(
    service: Service,
    model: Annotated[
        str, Path(description="`JOB_ID@PERCENT`, or a job's id.", json_schema_extra={"pattern": MODEL_ID_PATTERN})
    ],
) -> Model:
    """A recorded checkpoint; a job's id alone is its newest."""
    return _model(addressing.find_models(service.database, model)[0])


@router.post("/chat/completions", include_in_schema=False)
def chat() -> None:
    """Not here: these models continue texts, and were never taught to take turns."""
    raise NotFound("no_chat", "these models continue a text and cannot chat: use POST /v1/completions")


class _Answer:
    """A completion on its way out, whole or in chunks."""

    def __init__(self, address: Address, asked: CompletionRequest, n: int) -> None:
        self._asked = asked
        self._common: dict[str, Any] = {
            "id": f"cmpl-{uuid4().hex}",
            "created": int(time.time()),
            "model": address.model_id,
            "system_fingerprint": f"fp_{address.manifest_sha256[:16]}",
        }
        prompt = asked.prompt if asked.echo else ""
        self._writers = [ChoiceWriter(index, prompt) for index in range(n)]

    async def whole(self, items: AsyncGenerator[Chunk | Summary]) -> Completion:
        """All continuations, finished."""
        usage = None
        choices: dict[int, schemas.CompletionChoice] = {}
        async with aclosing(items):
            async for item in items:
                if isinstance(item, Summary):
                    usage = _usage(item)
                else:
                    # Not asked for in chunks, each continuation comes as one.
                    choices[item.index] = self._writers[item.index].write(item)
        return Completion(**self._common, choices=[choices[index] for index in sorted(choices)], usage=usage)

    def chunk(self, item: Chunk | Summary) -> Completion | None:
        """What a stream says of `item`."""
        if isinstance(item, Chunk):
            return Completion(**self._common, choices=[self._writers[item.index].write(item)], usage=None)
        options = self._asked.stream_options
        if options is None or not options.include_usage:
            return None
        return Completion(**self._common, choices=[], usage=_usage(item))


async def _events(
    answer: _Answer, first: Chunk | Summary, items: AsyncGenerator[Chunk | Summary]
) -> AsyncIterator[bytes]:
    """The stream on the wire. Closing it cancels the generation."""
    async with aclosing(items):
        try:
            yield _event(answer.chunk(first))
            async for item in items:
                yield _event(answer.chunk(item))
        except ServiceError as error:
            told = problems.openai_error(problems.of_service_error(error))
            yield format_sse_event(data_str=told.model_dump_json())
            return
    yield format_sse_event(data_str="[DONE]")


def _event(completion: Completion | None) -> bytes:
    return b"" if completion is None else format_sse_event(data_str=completion.model_dump_json())


def _ignored(asked: CompletionRequest) -> dict[str, str]:
    """The header that names what had no effect; names that no header can hold are a `?` in it."""
    names = [name if _HEADER_SAFE.fullmatch(name) else "?" for name in asked.ignored]
    return {"X-Ignored": ", ".join(sorted(set(names))[:_MAX_IGNORED])} if names else {}


def _usage(summary: Summary) -> schemas.CompletionUsage:
    return schemas.CompletionUsage(
        prompt_tokens=summary.prompt_tokens,
        completion_tokens=summary.completion_tokens,
        total_tokens=summary.prompt_tokens + summary.completion_tokens,
    )


def _model(address: Address) -> Model:
    return Model(id=address.model_id, created=int(address.created_at.timestamp()))
