"""Evaluation of a recorded checkpoint: the loss of a text, and attention and routing at a prompt."""

from anyio import to_thread
from fastapi import APIRouter, Request, Response

from nanomoe.evaluation.copied_spans import longest_copied_span
from service.http import views
from service.http.context import Context
from service.http.openapi import problems
from service.http.routes.client_disconnect import CLIENT_CLOSED_REQUEST, cancel_on_disconnect
from service.http.routes.parameters import Service
from service.http.routes.responses import as_json
from service.http.schemas import CopiedSpan, InspectRequest, InspectResponse, ScoreRequest, ScoreResponse
from service.jobs import reads
from service.jobs.addressing import Address, find_checkpoints, first_undamaged

router = APIRouter(tags=["generation"])


@router.post(
    "/score",
    summary="Score a text",
    response_description="The loss of each token, and the longest copied span.",
    response_model=ScoreResponse,
    responses=problems(400, 404, 409, 413, 415, 422, 429, 503),
)
async def score(service: Service, request: ScoreRequest, connection: Request) -> Response:
    """Compute the loss of each token of a text, and the longest span of it that occurs in the training text."""
    addresses = await to_thread.run_sync(find_checkpoints, service.database, request.job_id, request.checkpoint)
    scoring = first_undamaged(addresses, lambda one: service.generation.score(*_folder_of(service, one), request.text))
    scored = await cancel_on_disconnect(connection, scoring)
    if scored is None:
        return CLIENT_CLOSED_REQUEST
    copied = await to_thread.run_sync(_copied, service, scored[0].job_id, request.text, limiter=service.comparing)
    return as_json(views.scored(scored[0], request.text, scored[1], copied))


@router.post(
    "/inspect",
    summary="Look into a model at a prompt",
    response_description="The likeliest next tokens, the attention and the routing.",
    response_model=InspectResponse,
    responses=problems(400, 404, 409, 413, 415, 422, 429, 503),
)
async def inspect(service: Service, request: InspectRequest, connection: Request) -> Response:
    """Evaluate a prompt: the likeliest next tokens, the attention of each head, and the routing of each token."""
    addresses = await to_thread.run_sync(find_checkpoints, service.database, request.job_id, request.checkpoint)
    inspecting = first_undamaged(
        addresses,
        lambda one: service.generation.inspect(*_folder_of(service, one), request.prompt, attention=request.attention),
    )
    inspected = await cancel_on_disconnect(connection, inspecting)
    return CLIENT_CLOSED_REQUEST if inspected is None else as_json(views.inspected(*inspected))


def _folder_of(service: Context, address: Address) -> tuple[str, str]:
    return (service.store / address.folder).location, address.manifest_sha256


def _copied(service: Context, job_id: str, text: str) -> CopiedSpan | None:
    """The longest span of `text` that occurs in the job's training text, in whole characters."""
    training = reads.get_text(service.database, reads.get_job(service.database, job_id).text_sha256)
    scored = text.encode()
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
