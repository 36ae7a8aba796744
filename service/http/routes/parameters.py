"""Parameters of several routes: the service's context, and the ids and names in paths.

A job or a sweep is looked up before its route is called. A malformed id is answered as an unknown one is: 404.
"""

import re
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import Depends, Header, Path, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints

from nanomoe.config import JOB_ID_PATTERN, PERCENTS, Percent
from service.database.caller import Caller
from service.errors import NotFound
from service.http.access import identity_of
from service.http.context import Context
from service.http.patterns import IDEMPOTENCY_KEY
from service.jobs.references import MIN_PREFIX, find_job_id, find_sweep_id

_JOB_ID = re.compile(JOB_ID_PATTERN)
_CHECKPOINTS: dict[str, Percent | Literal["latest"]] = {
    **{str(percent): percent for percent in PERCENTS},
    "latest": "latest",
}
_FILE_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")


def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    identity = identity_of(request)
    # On behalf of nobody, nothing is there.
    caller = Caller(sees_all=False) if identity is None else identity.caller
    return replace(context, database=context.database.acting_as(caller))


Service = Annotated[Context, Depends(_context)]
"""The context of a request: its database shows and changes what its key may, and nothing else."""


class StrictQuery(BaseModel):
    """Query parameters. Unknown ones are refused, so that a misspelt one is not ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


_JobReference = Annotated[
    str,
    Path(
        description=f"The job: its id, its name, or a unique beginning of its id of {MIN_PREFIX} characters or more. "
        "A name with a slash cannot stand in a path: `GET /jobs?name=` finds its id.",
        json_schema_extra={"pattern": r"^[^\x00-\x1f\x7f/]{1,200}$"},
    ),
]


async def _job_id(service: Service, job_id: _JobReference) -> str:
    if _JOB_ID.fullmatch(job_id):
        return job_id
    return await to_thread.run_sync(find_job_id, service.database, job_id)


async def _certain_job_id(service: Service, job_id: _JobReference) -> str:
    if _JOB_ID.fullmatch(job_id):
        return job_id
    return await to_thread.run_sync(partial(find_job_id, service.database, job_id, certain=True))


JobId = Annotated[str, Depends(_job_id)]
"""Id of the job that the path names."""

CertainJobId = Annotated[str, Depends(_certain_job_id)]
"""`JobId` of a route that cannot be undone."""


_SweepReference = Annotated[
    str,
    Path(
        description=f"The sweep: its id, its name, or a unique beginning of its id of {MIN_PREFIX} characters or more.",
        json_schema_extra={"pattern": r"^[^\x00-\x1f\x7f/]{1,200}$"},
    ),
]


async def _sweep_id(service: Service, sweep_id: _SweepReference) -> str:
    if _JOB_ID.fullmatch(sweep_id):
        return sweep_id
    return await to_thread.run_sync(find_sweep_id, service.database, sweep_id)


async def _certain_sweep_id(service: Service, sweep_id: _SweepReference) -> str:
    if _JOB_ID.fullmatch(sweep_id):
        return sweep_id
    return await to_thread.run_sync(partial(find_sweep_id, service.database, sweep_id, certain=True))


SweepId = Annotated[str, Depends(_sweep_id)]
"""Id of the sweep that the path names."""

CertainSweepId = Annotated[str, Depends(_certain_sweep_id)]
"""`SweepId` of a route that cannot be undone."""

IdempotencyKey = Annotated[
    Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=IDEMPOTENCY_KEY)] | None,
    Header(description="Token that makes the request safe to repeat: the same key and request get the first answer."),
]


def _checkpoint(given: str) -> str:
    if given not in _CHECKPOINTS:
        raise NotFound("checkpoint_not_found", f"a checkpoint is one of {', '.join(_CHECKPOINTS)}, not {given!r}")
    return given


CheckpointPath = Annotated[
    str,
    Path(
        description="Percent of the checkpoint, or `latest` for the newest.",
        json_schema_extra={"enum": list[Any](_CHECKPOINTS)},
    ),
    AfterValidator(_checkpoint),
]


def selected(given: str) -> Percent | Literal["latest"]:
    """The percent, or `latest`, that a validated path parameter stands for."""
    return _CHECKPOINTS[given]


def _file_name(given: str) -> str:
    if not _FILE_NAME.fullmatch(given):
        raise NotFound("file_not_found", f"no checkpoint has a file {given!r}")
    return given


FileName = Annotated[
    str,
    Path(
        description="Name of the file, as listed in the checkpoint.", json_schema_extra={"pattern": _FILE_NAME.pattern}
    ),
    AfterValidator(_file_name),
]
