"""What requests and responses share: the checkpoint that is meant, views, pages of lists, and errors."""

from datetime import datetime
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from nanomoe.config import JOB_REFERENCE_PATTERN, Percent, Strict, Whole
from service.jobs.statuses import Status

BYTE_ORDER_MARK = "\ufeff"


def _without_mark(given: object) -> object:
    return given.removeprefix(BYTE_ORDER_MARK) if isinstance(given, str) else given


Text = Annotated[str, BeforeValidator(_without_mark)]
"""A text that may come from a file: a byte-order mark at its start is dropped."""

T = TypeVar("T")


def _is_empty(values: list[object]) -> bool:
    return not values


def _is_none(value: object) -> bool:
    return value is None


SAME_AS = "x-same-as"
"""Key of a JSON schema that stands for another schema, whose name is its value; the OpenAPI document refers to that."""


class CheckpointRequest(Strict):
    """The body of a request that is answered from one checkpoint."""

    job_id: str = Field(max_length=200, pattern=JOB_REFERENCE_PATTERN)
    """The job whose checkpoint is used: its id, its name, or a unique beginning of its id."""

    checkpoint: Annotated[Percent, Whole] | Literal["latest"] = "latest"
    """Percent of a recorded checkpoint, or the newest that is not damaged."""


class View(BaseModel):
    """A frozen response. Fields that this version does not know are ignored."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Page(View, Generic[T]):
    """One page of a list, newest first."""

    # pydantic gives `Page[JobView]` no docstring.
    model_config = ConfigDict(json_schema_extra={"description": "One page of a list, newest first."})

    data: list[T]
    """Entries of this page."""

    next_cursor: str | None
    """Value of `cursor` that asks for the next page; null at the end."""


class Listing(View, Generic[T]):
    """A list short enough for one page."""

    model_config = ConfigDict(json_schema_extra={"description": "A list short enough for one page."})

    data: list[T]
    """All entries of the list."""


class ProblemError(View):
    """One fault of an invalid request."""

    loc: list[str | int]
    """Path to the faulty field: `body`, `query`, `path` or `header` first."""

    msg: str
    """What is wrong with the field."""


class JobCandidate(View):
    """A job, or a sweep, that may have been meant."""

    id: str
    """Id of the job or sweep."""

    name: str | None
    """Name of the job or sweep; null for none."""

    status: Status
    """Status of the job or sweep."""

    created_at: datetime
    """Time at which the job or sweep was submitted."""


class QuotaState(View):
    """A quota of the key's owner, and how far it is used."""

    name: str
    """Name of the quota: `queued_jobs`, `running_jobs`, `device_seconds_per_day` or `bytes_stored`."""

    limit: float
    """Most that the owner may use."""

    used: float
    """Amount that the owner uses now."""

    left: float
    """Amount that is left."""


class Problem(View):
    """An error (RFC 9457, `application/problem+json`)."""

    type: str
    """`about:blank`, or an address that names the problem."""

    title: str
    """Short summary of the kind of error."""

    status: int
    """HTTP status of the response."""

    detail: str
    """Explanation of this occurrence of the error, for people."""

    code: str
    """Stable, machine-readable name of the error."""

    errors: list[ProblemError] = []
    """Each fault of an invalid request, up to 20."""

    candidates: list[JobCandidate] = Field(default_factory=list, exclude_if=_is_empty)
    """With `ambiguous_job` and `ambiguous_sweep` those that may have been meant, newest first, up to 20; otherwise left
    out."""

    quota: QuotaState | None = Field(None, exclude_if=_is_none)
    """With `quota_exceeded` the quota that is used up; otherwise left out."""
