"""Which recorded checkpoint a request means: by job and percent, or by a model id `JOB_ID@PERCENT`. Knows no HTTP."""

import re
from datetime import datetime
from typing import Literal, NamedTuple

from sqlmodel import col, select

from service import store
from service.database import Database
from service.errors import Conflict, NotFound
from service.tables import PERCENTS, Checkpoint

MODEL_ID_PATTERN = rf"^[0-9a-f]{{32}}(@({'|'.join(map(str, PERCENTS))}))?$"
"""`JOB_ID@PERCENT`, or `JOB_ID` for its newest checkpoint."""

MAX_MODELS = 1000
"""Most models that are listed: a list of OpenAI's has no pages."""


class ModelRow(NamedTuple):
    """What a list of models tells of a checkpoint."""

    job_id: str
    percent: int
    created_at: datetime


def checkpoint_to_use(db: Database, job_id: str, which: int | Literal["latest"]) -> Checkpoint:
    """The checkpoint to work with.

    Raises:
        NotFound: `job_not_found`, `checkpoint_not_found`.
        Conflict: `no_checkpoint_yet`.
    """
    try:
        return store.get_checkpoint(db, job_id, which)
    except NotFound as error:
        if error.code == "checkpoint_not_found" and not store.list_checkpoints(db, job_id):
            raise Conflict("no_checkpoint_yet", f"job {job_id} has not recorded a checkpoint yet") from error
        raise


def model_id(job_id: str, percent: int) -> str:
    """What a checkpoint is called as a model."""
    return f"{job_id}@{percent}"


def find_model(db: Database, model: str) -> Checkpoint:
    """The checkpoint that is called so. Raises NotFound `model_not_found`."""
    job_id, _, percent = model.partition("@")
    if re.fullmatch(MODEL_ID_PATTERN, model) is None:
        raise _no_model(f"a model is called JOB_ID@PERCENT, or JOB_ID for its newest checkpoint, not {model!r}")
    try:
        return store.get_checkpoint(db, job_id, int(percent) if percent else "latest")
    except NotFound as error:
        raise _no_model(error.detail) from error


def list_models(db: Database) -> list[ModelRow]:
    """The checkpoints of the newest jobs, the newest of each first; at most `MAX_MODELS`."""
    # Not the whole rows: they hold reconstructions.
    columns = select(Checkpoint.job_id, Checkpoint.percent, Checkpoint.created_at)
    query = columns.order_by(col(Checkpoint.job_id).desc(), col(Checkpoint.percent).desc()).limit(MAX_MODELS)
    with db.read() as session:
        return [ModelRow(*row) for row in session.exec(query)]


def _no_model(detail: str) -> NotFound:
    return NotFound("model_not_found", detail, errors=[{"loc": ["body", "model"], "msg": "there is no such model"}])
