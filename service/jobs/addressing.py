"""Which recorded checkpoint a request means, by job and percent or by a model id `JOB_ID@PERCENT`, and which one
replaces a newest one that is damaged. Knows no HTTP.
"""

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Literal, NamedTuple, TypeVar

import sqlalchemy as sa
import structlog

from nanomoe.checkpoint import CheckpointDamaged
from nanomoe.config import PERCENTS
from service.database.database import Database
from service.database.schema import table
from service.errors import Ambiguous, Conflict, NotFound
from service.jobs import reads
from service.jobs.ownership import visible_jobs
from service.jobs.references import find_job_id
from service.jobs.tables import Checkpoint, Job

T = TypeVar("T")

log = structlog.get_logger(__name__)

MAX_MODELS = 1000
"""Most models in a list: OpenAI's list of models has no pages."""


_PERCENTS = tuple(map(str, PERCENTS))


class Address(NamedTuple):
    """A recorded checkpoint and where its files lie: the row without its metrics, which may be large."""

    job_id: str
    percent: int
    created_at: datetime
    folder: str
    """Folder of the files, relative to the data folder."""

    manifest_sha256: str
    """SHA-256 of the manifest, which holds the SHA-256 of every file; hexadecimal."""

    @property
    def model_id(self) -> str:
        """The model id of the checkpoint."""
        return f"{self.job_id}@{self.percent}"


jobs = table(Job)
checkpoints = table(Checkpoint)
_addresses = sa.select(*(checkpoints.c[name] for name in Address._fields))


def find_checkpoints(db: Database, job: str, which: int | Literal["latest"]) -> list[Address]:
    """The checkpoint `which` of a job; for `latest` all of them, the newest first, since the newest may be damaged.
    `job`: as `find_job_id` takes it.

    Raises:
        NotFound: `job_not_found`, `checkpoint_not_found`.
        Conflict: `no_checkpoint_yet`, `ambiguous_job`.
    """
    job_id = find_job_id(db, job)
    with db.read() as session:
        reads.load_job(session, job_id)
        of_job = session.execute(_addresses.where(checkpoints.c.job_id == job_id))
        recorded = {row.percent: Address(*row) for row in of_job}
        if not recorded:
            raise Conflict("no_checkpoint_yet", f"job {job_id} has not recorded a checkpoint yet")
    if which == "latest":
        return [recorded[percent] for percent in sorted(recorded, reverse=True)]
    if which not in recorded:
        raise NotFound("checkpoint_not_found", f"job {job_id} has no checkpoint {which} yet")
    return [recorded[which]]


async def first_undamaged(addresses: Sequence[Address], use: Callable[[Address], Awaitable[T]]) -> tuple[Address, T]:
    """The first checkpoint that `use` does not find damaged, and the value that `use` returned for it.

    Raises:
        Conflict: `checkpoint_damaged`, for the first checkpoint, when all are damaged.
        ServiceError: any other error that `use` raises.
    """
    damage: Conflict | None = None
    for address in addresses:
        try:
            return address, await use(address)
        except Conflict as error:
            if error.code != CheckpointDamaged.code:
                raise
            log.warning("checkpoint_damaged", job_id=address.job_id, percent=address.percent, reason=error.detail)
            damage = damage or error
    assert damage is not None, "there is one at least"
    raise damage


def find_models(db: Database, model: str) -> list[Address]:
    """The checkpoints of a model id, as `find_checkpoints` returns them; a job may be named as `find_job_id` takes it.

    Raises:
        NotFound: `model_not_found`.
        Ambiguous: several jobs are meant.
    """
    job, _, percent = model.rpartition("@")
    of_job: str
    which: int | Literal["latest"]
    of_job, which = (job, int(percent)) if job and percent in _PERCENTS else (model, "latest")
    try:
        return find_checkpoints(db, of_job, which)
    except Ambiguous:
        raise
    except (NotFound, Conflict) as error:
        hint = "; a model id is JOB_ID@PERCENT, or JOB_ID for its newest checkpoint"
        raise _no_model(error.detail + (hint if error.code == "job_not_found" else "")) from error


def list_models(db: Database) -> list[Address]:
    """The checkpoints of the newest jobs, the newest of each first; at most `MAX_MODELS`."""
    of_job = _addresses.join(jobs, jobs.c.id == checkpoints.c.job_id)
    newest_first = of_job.order_by(jobs.c.seq.desc(), checkpoints.c.percent.desc())
    with db.read() as session:
        shown = newest_first.where(visible_jobs(session)).limit(MAX_MODELS)
        return [Address(*row) for row in session.execute(shown)]


def _no_model(detail: str) -> NotFound:
    return NotFound("model_not_found", detail, errors=[{"loc": ["body", "model"], "msg": "there is no such model"}])
