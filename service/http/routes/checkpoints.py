"""Recorded checkpoints, their reconstructions and their files."""

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse, Response
from pydantic import Field

from service.http import files, schemas, views
from service.http.openapi import NOT_MODIFIED, problems
from service.http.routes.parameters import CheckpointPath, FileName, JobId, Service, StrictQuery, selected
from service.jobs import reads

_BYTES = {"type": "string", "format": "binary"}

router = APIRouter(tags=["checkpoints"], prefix="/jobs/{job_id}/checkpoints")


class ReconstructionQuery(StrictQuery):
    """Query of `GET /jobs/{id}/checkpoints/{percent}/reconstruction`."""

    start: int = Field(0, ge=0, le=2**31, alias="from")
    """Index of the first target of the page."""

    count: int = Field(500, ge=1, le=5000)
    """Most targets of a page."""


@router.get(
    "",
    summary="List a job's checkpoints",
    response_description="The recorded checkpoints, by percent.",
    responses=problems(404, 409, 503),
)
def list_checkpoints(service: Service, job_id: JobId) -> schemas.Listing[schemas.CheckpointView]:
    """The recorded checkpoints of a job, by percent."""
    rows = reads.list_checkpoints(service.database, job_id)
    best = views.best_percent(rows)
    return schemas.Listing(data=[views.checkpoint(row, best=best) for row in rows])


@router.get(
    "/{percent}",
    summary="Get a checkpoint",
    response_description="The recorded checkpoint, with its files.",
    responses=problems(404, 409, 503),
)
def get_checkpoint(service: Service, job_id: JobId, percent: CheckpointPath) -> schemas.CheckpointView:
    """One recorded checkpoint of a job, by percent or the newest."""
    row = reads.get_checkpoint(service.database, job_id, selected(percent))
    return views.checkpoint(row, best=views.best_percent(reads.list_checkpoints(service.database, job_id)))


@router.get(
    "/{percent}/reconstruction",
    summary="Page through a reconstruction",
    response_description="A page of the reconstruction.",
    responses=problems(404, 409, 422, 503),
)
def get_reconstruction(
    service: Service, job_id: JobId, percent: CheckpointPath, query: Annotated[ReconstructionQuery, Query()]
) -> schemas.ReconstructionPage:
    """The model's prediction for the targets of the training text, a page at a time."""
    row = reads.get_checkpoint(service.database, job_id, selected(percent))
    return views.reconstruction(row, query.start, query.count)


@router.get(
    "/{percent}/files/{name}",
    summary="Download a file of a checkpoint",
    response_class=FileResponse,
    responses={
        200: {"description": "The complete file.", "content": {"application/octet-stream": {"schema": _BYTES}}},
        206: {
            "description": "The range of the file that was asked for; several come as `multipart/byteranges`.",
            "content": {
                "application/octet-stream": {"schema": _BYTES},
                "multipart/byteranges": {"schema": _BYTES},
            },
        },
        304: NOT_MODIFIED,
        307: {
            "description": "The file can be read at `Location` for some minutes, without a key: where "
            "`NANOMOE_DOWNLOADS` is `redirect`.",
        },
        **problems(404, 409, 412, 416, 503),
    },
)
def get_checkpoint_file(service: Service, job_id: JobId, percent: CheckpointPath, name: FileName) -> Response:
    """A file of a checkpoint. `Repr-Digest` is its recorded SHA-256."""
    row = reads.get_checkpoint(service.database, job_id, selected(percent))
    return files.recorded_file(row, name, service.store, redirects=service.settings.downloads == "redirect")
