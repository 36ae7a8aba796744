"""The OpenAI shapes: programs written for OpenAI's completions work with recorded checkpoints as their models."""

import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, Self
from uuid import uuid4

from anyio import to_thread
from fastapi import APIRouter, Path, Request, Response
from fastapi.sse import format_sse_event

from service.errors import Invalid, NotFound, ServiceError
from service.generation.admission import empty_prompt
from service.generation.messages import Chunk, EngineRequest, PromptTokenLogProbs
from service.generation.prompts import Count, Gain, continue_all
from service.http import problems, schemas
from service.http.context import Context
from service.http.openai_choices import ChoiceWriter, text_of
from service.http.openapi import openai_errors, ref
from service.http.routes import event_stream
from service.http.routes.client_disconnect import CLIENT_CLOSED_REQUEST, cancel_on_disconnect
from service.http.routes.event_stream import EventStream
from service.http.routes.parameters import Service
from service.http.routes.responses import as_json
from service.http.schemas import Completion, CompletionRequest, Model, ModelList
from service.jobs import addressing
from service.jobs.addressing import Address, first_undamaged
from service.settings import Settings

router = APIRouter(prefix="/v1", tags=["openai"])

MAX_TOKENS = 16
"""Default of `max_tokens`, as in OpenAI's completions."""

MAX_CHOICES = 2048
"""Most continuations of one request, of all its prompts together."""

MAX_SCORED = 16_384
"""Most characters or token ids whose log-probabilities one request may ask for: while they are written, each takes
11 KB in the engine and 8 KB here (measured with `logprobs` 5)."""

MAX_ECHOED = 1 << 24
"""Most characters or token ids that one request may have repeated."""

_HEADER_SAFE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_IGNORED = 20


@router.post(
    "/completions",
    summary="Continue a prompt, in OpenAI's shape",
    response_model=Completion,
    responses={
        200: {
            "description": "The continuations; with `stream`, as chunks of the same shape, then `[DONE]`.",
            "headers": {
                "X-Ignored": {
                    "description": "Names of the request's fields that had no effect.",
                    "schema": {"type": "string"},
                }
            },
            "content": {
                "application/json": {"schema": ref(Completion)},
                **event_stream.documented("Chunks, each the data of an event, then `[DONE]`."),
            },
        },
        **openai_errors(400, 404, 409, 413, 415, 422, 429, 503),
    },
)
async def create_completion(service: Service, asked: CompletionRequest, connection: Request) -> Response:
    """Continue prompts, in the shape of OpenAI's legacy completions."""
    resolved = _Resolved.of(asked, service.settings)
    addresses = await to_thread.run_sync(addressing.find_models, service.database, asked.model)

    async def finish(address: Address) -> Completion:
        answer, items = await _begin(service, resolved, address)
        return await answer.complete(items)

    async def begin(address: Address) -> tuple[_Answer, Gain | Count, AsyncGenerator[Gain | Count]]:
        answer, items = await _begin(service, resolved, address)
        # The first item decides the status: once the answer has begun, it is too late for a 503.
        return answer, await anext(items), items

    headers = _ignored(asked)
    try:
        if not asked.stream:
            finished = await cancel_on_disconnect(connection, first_undamaged(addresses, finish))
            return CLIENT_CLOSED_REQUEST if finished is None else as_json(finished[1], headers)
        begun = await cancel_on_disconnect(connection, first_undamaged(addresses, begin))
    except Invalid as error:
        raise resolved.in_prompt(error) from error
    if begun is None:
        return CLIENT_CLOSED_REQUEST
    return EventStream(_events(*begun[1]), headers)


@dataclass(frozen=True)
class _Resolved:
    """A request within the server's limits, with defaults in place of nulls."""

    asked: CompletionRequest
    prompts: list[str | list[int]]
    n: int
    max_tokens: int
    seeds: list[int]
    """Seed of each prompt."""

    @classmethod
    def of(cls, asked: CompletionRequest, settings: Settings) -> Self:
        """Raises Invalid: a prompt is empty, or a limit is exceeded, by one prompt or by all together."""
        resolved = cls(
            asked,
            prompts=asked.prompts,
            n=1 if asked.n is None else asked.n,
            max_tokens=MAX_TOKENS if asked.max_tokens is None else asked.max_tokens,
            seeds=[secrets.randbits(63) if asked.seed is None else asked.seed for _ in asked.prompts],
        )
        resolved._check(settings)
        return resolved

    def _check(self, settings: Settings) -> None:
        for place, prompt in enumerate(self.prompts):
            if not prompt:
                raise self.in_prompt(empty_prompt(place))
        most_each, most_running = settings.engine_max_new_tokens, settings.engine_max_running
        _limit("max_tokens_too_large", "max_tokens", self.max_tokens, most_each)
        _limit("n_too_large", "n", self.n, most_running)
        n_choices = len(self.prompts) * self.n
        _limit("too_many_choices", "prompt", n_choices, MAX_CHOICES, "prompts times n")
        n_tokens, most = n_choices * self.max_tokens, most_each * most_running
        _limit("too_many_tokens", "prompt", n_tokens, most, "prompts times n times max_tokens")
        if self.asked.echo:
            size = self.n * sum(map(len, self.prompts))
            _limit("prompt_too_long", "prompt", size, MAX_ECHOED, "with echo, the length of all prompts times n")
            if self.asked.logprobs is not None:
                what = "with echo and logprobs, the length of all prompts times n"
                _limit("prompt_too_long", "prompt", size, MAX_SCORED, what)

    @property
    def is_read(self) -> bool:
        """Whether the prompts' own tokens are needed."""
        are_texts = isinstance(self.prompts[0], str)
        return self.max_tokens == 0 or bool(self.asked.echo and (self.asked.logprobs is not None or not are_texts))

    def in_prompt(self, error: Invalid) -> Invalid:
        """The error, without the place of a prompt that stands alone."""
        if self.asked.several:
            return error
        faults = [
            {**fault, "loc": ["body", "prompt", *fault["loc"][3:]]}
            if fault["loc"][:3] == ["body", "prompt", 0]
            else fault
            for fault in error.errors
        ]
        return Invalid(error.code, error.detail, errors=faults)


def _limit(code: str, field: str, value: int, most: int, what: str | None = None) -> None:
    if value > most:
        raise Invalid(
            code,
            f"{what or field}: {value:,}; this server's limit is {most:,}",
            errors=[{"loc": ["body", field], "msg": "above the server's limit"}],
        )


async def _begin(
    service: Context, resolved: _Resolved, address: Address
) -> tuple["_Answer", AsyncGenerator[Gain | Count]]:
    """The answer of one checkpoint, with the prompts' own tokens where they are needed, and the chunks to come."""
    asked, folder = resolved.asked, (service.store / address.folder).location
    read: Sequence[Sequence[PromptTokenLogProbs]] | None = None
    if resolved.is_read:
        logprobs = asked.logprobs if asked.echo else None
        read = await service.generation.read_prompts(folder, address.manifest_sha256, resolved.prompts, logprobs)
    answer = _Answer(address, resolved, read)
    if read is not None and resolved.max_tokens == 0:
        return answer, _empty_continuations(resolved, read)
    requests = [
        EngineRequest(
            folder=folder,
            manifest_sha256=address.manifest_sha256,
            prompt=prompt if isinstance(prompt, str) else tuple(prompt),
            max_new_tokens=resolved.max_tokens,
            sampling=asked,
            seed=seed,
            n=resolved.n,
            stop=asked.stops,
            logprobs=asked.logprobs,
        )
        for prompt, seed in zip(resolved.prompts, resolved.seeds, strict=True)
    ]
    at_once = service.settings.engine_max_running // resolved.n
    return answer, continue_all(service.generation, requests, at_once=at_once, in_chunks=bool(asked.stream))


async def _empty_continuations(
    resolved: _Resolved, read: Sequence[Sequence[PromptTokenLogProbs]]
) -> AsyncGenerator[Gain | Count]:
    """The chunks and usage of continuations without a token."""
    logprobs = None if resolved.asked.logprobs is None else ()
    for prompt in range(len(read)):
        for index in range(resolved.n):
            yield Gain(prompt, Chunk(id=0, index=index, text="", tokens=(), logprobs=logprobs, finish_reason="length"))
    yield Count(prompt_tokens=sum(map(len, read)), completion_tokens=0)


@router.get(
    "/models",
    summary="List checkpoints as OpenAI's models",
    response_description="The checkpoints as models.",
    responses=openai_errors(503),
)
def list_models(service: Service) -> ModelList:
    """The recorded checkpoints, those of the newest jobs first, at most 1,000."""
    return ModelList(data=[_model(address) for address in addressing.list_models(service.database)])


@router.get(
    "/models/{model}",
    summary="Get a checkpoint as OpenAI's model",
    response_description="The checkpoint as a model.",
    responses=openai_errors(404, 409, 503),
)
def get_model(
    service: Service,
    model: Annotated[
        str,
        Path(
            description="`JOB@PERCENT`, or a job alone: by its id, its name, or a unique beginning of its id.",
            json_schema_extra={"pattern": r"^[^\x00-\x1f\x7f/]{1,204}$"},
        ),
    ],
) -> Model:
    """A recorded checkpoint; a job's id alone is its newest."""
    return _model(addressing.find_models(service.database, model)[0])


@router.post("/chat/completions", include_in_schema=False)
def chat() -> None:
    """Refuse chat: these models continue texts, and are not trained on dialogue."""
    raise NotFound("no_chat", "these models continue a text and cannot chat: use POST /v1/completions")


class _Answer:
    """Builds the response of a completion, complete or in chunks."""

    def __init__(
        self, address: Address, resolved: _Resolved, read: Sequence[Sequence[PromptTokenLogProbs]] | None
    ) -> None:
        """`read`: the prompts' own tokens, where they are needed."""
        self._n = resolved.n
        self._options = resolved.asked.stream_options
        self._common: dict[str, Any] = {
            "id": f"cmpl-{uuid4().hex}",
            "created": int(time.time()),
            "model": address.model_id,
            "system_fingerprint": f"fp_{address.manifest_sha256[:16]}",
        }
        self._writers: list[ChoiceWriter] = []
        for place, prompt in enumerate(resolved.prompts):
            tokens = read[place] if read and resolved.asked.echo else ()
            text = "" if not resolved.asked.echo else prompt if isinstance(prompt, str) else text_of(tokens)
            first = place * resolved.n
            self._writers += [ChoiceWriter(index, text, tokens) for index in range(first, first + resolved.n)]

    async def complete(self, items: AsyncGenerator[Gain | Count]) -> Completion:
        """The response with all continuations, once they are finished."""
        usage = None
        choices: list[schemas.CompletionChoice] = []
        async with aclosing(items):
            async for item in items:
                if isinstance(item, Count):
                    usage = _usage(item)
                else:
                    # Not asked for in chunks, each continuation comes as one.
                    choices.append(self._write(item))
        return Completion(**self._common, choices=sorted(choices, key=lambda choice: choice.index), usage=usage)

    def chunk(self, item: Gain | Count) -> Completion | None:
        """The chunk of a stream for `item`; None where it has none."""
        if isinstance(item, Gain):
            return Completion(**self._common, choices=[self._write(item)], usage=None)
        if self._options is None or not self._options.include_usage:
            return None
        return Completion(**self._common, choices=[], usage=_usage(item))

    def _write(self, gain: Gain) -> schemas.CompletionChoice:
        return self._writers[gain.prompt * self._n + gain.chunk.index].write(gain.chunk)


async def _events(answer: _Answer, first: Gain | Count, items: AsyncGenerator[Gain | Count]) -> AsyncIterator[bytes]:
    """The encoded events of the stream. Closing it cancels the generation."""
    async with aclosing(items):
        try:
            yield _event(answer.chunk(first))
            async for item in items:
                yield _event(answer.chunk(item))
        except ServiceError as error:
            body = problems.openai_error(problems.of_service_error(error))
            yield format_sse_event(data_str=body.model_dump_json())
            return
    yield format_sse_event(data_str="[DONE]")


def _event(completion: Completion | None) -> bytes:
    return b"" if completion is None else format_sse_event(data_str=completion.model_dump_json())


def _ignored(asked: CompletionRequest) -> dict[str, str]:
    """The header that names fields without effect; a name that a header cannot hold is shown as `?`."""
    names = [name if _HEADER_SAFE.fullmatch(name) else "?" for name in asked.ignored]
    return {"X-Ignored": ", ".join(sorted(set(names))[:_MAX_IGNORED])} if names else {}


def _usage(count: Count) -> schemas.CompletionUsage:
    return schemas.CompletionUsage(
        prompt_tokens=count.prompt_tokens,
        completion_tokens=count.completion_tokens,
        total_tokens=count.prompt_tokens + count.completion_tokens,
    )


def _model(address: Address) -> Model:
    return Model(id=address.model_id, created=int(address.created_at.timestamp()))
