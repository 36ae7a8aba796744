"""Looking into a recorded checkpoint: how well it knows a text, and what a prompt makes it do."""

from anyio import to_thread
from fastapi import APIRouter, Request, Response

from nanomoe.evaluation.copied_spans import longest_copied_span
from service.http import views
from service.http.context import Context
from service.http.openapi import problems
from service.http.routes.client_disconnect import CLIENT_IS_GONE, unless_gone
from service.http.routes.parameters import Service
from service.http.routes.responses import as_json
from service.http.schemas import CopiedSpan, InspectRequest, InspectResponse, ScoreRequest, ScoreResponse
from service.jobs import reads
from service.jobs.addressing import Address, find_checkpoints, first_whole

router = APIRouter(tags=["generation"])


@router.post(
    "/score",
    summary="Score a text",
    response_description="The loss of each token, and the copied span.",
    response_model=ScoreResponse,
    responses=problems(400, 404, 409, 413, 415, 422, 429, 503),
)
async def score(service: Service, asked: ScoreRequest, connection: Request) -> Response:
    """The loss of each token of a text, and the longest span of it that stands in the training text."""
    addresses = await to_thread.run_sync(find_checkpoints, service.database, asked.job_id, asked.checkpoint)
    scoring = first_whole(addresses, lambda one: service.generation.score(*_place(service, one), asked.text))
    scored = await unless_gone(connection, scoring)
    if scored is None:
        return CLIENT_IS_GONE
    copied = await to_thread.run_sync(_copied, service, asked, limiter=service.comparing)
    return as_json(views.scored(scored[0], asked.text, scored[1], copied))


@router.post(
    "/inspect",
    summary="Look into a model at a prompt",
    response_description="The likeliest next tokens, the attention and the routing.",
    response_model=InspectResponse,
    responses=problems(400, 404, 409, 413, 415, 422, 429, 503),
)
async def inspect(service: Service, asked: InspectRequest, connection: Request) -> Response:
    """What a prompt makes a model do: likeliest next tokens, attention of each head, and how each token was routed."""
    addresses = await to_thread.run_sync(find_checkpoints, service.database, asked.job_id, asked.checkpoint)
    inspecting = first_whole(
        addresses,
        lambda one: service.generation.inspect(*_place(service, one), asked.prompt, attention=asked.attention),
    )
    inspected = await unless_gone(connection, inspecting)
    return CLIENT_IS_GONE if inspected is None else as_json(views.inspected(*inspected))


def _place(service: Context, address: Address) -> tuple[str, str]:
    return str(service.settings.data_dir / address.folder), address.manifest_sha256


def _copied(service: Context, asked: ScoreRequest) -> CopiedSpan | None:
    """The longest span shared with the training text, in whole characters."""
    training = reads.get_text(service.database, reads.get_job(service.database, asked.job_id).text_sha256)
    scored = asked.text.encode()
    found = longest_copied_span(scored, training)
    start, end = found.start, found.start + found.n_bytes
    # The bytes that two texts share may begin and end within a character.
    while start < end and scored[start] & 0xC0 == 0x80:
        start += 1
    while end > start and end < len(scored) and scored[end] & 0xC0 == 0x80:
        end -= 1
    if start == end:
        return None
    return CopiedSpan(
        text=scored[start:end].decode(),
        n_bytes=end - start,
        start=start,
        training_start=found.training_start + start - found.start,
    )
