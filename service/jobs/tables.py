"""The tables: the columns of a row, the constraints that the database checks, and the indexes that queries use.

Knows no connection, no query and no HTTP. Times are microseconds since 1970 in the database (one arithmetic for SQLite
and PostgreSQL) and aware UTC datetimes in Python. Rows are not validated here: SQLModel tables never are.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    LargeBinary,
    Sequence,
    text,
)
from sqlmodel import AutoString, Field

from nanomoe.config import PERCENTS
from service.access import tables as _access_tables  # noqa: F401 - all tables are one schema
from service.database.schema import Row
from service.database.utc_time import UtcTime
from service.jobs.ids import new_id
from service.jobs.statuses import STATUSES, TERMINAL, Status

SERIES = ("train_loss", "lr", "grad_norm")
"""The columns of the step series, in the order of its CSV."""

_WITHOUT_ROWID = {"sqlite_with_rowid": False}
"""The rows of a table lie in its primary key's index, which saves SQLite a second one."""


def _json(*, nullable: bool = False) -> Column[Any]:
    return Column(JSON(none_as_null=True), nullable=nullable)


def _job_key() -> Column[Any]:
    return Column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)


class Text(Row, table=True):
    """A training text, stored once however many jobs train on it."""

    __tablename__ = "texts"

    sha256: str = Field(primary_key=True)
    """SHA-256 of the UTF-8 bytes, hexadecimal."""

    n_bytes: int = Field(sa_type=BigInteger)
    content: bytes = Field(sa_type=LargeBinary)
    """UTF-8; bytes and not text, because PostgreSQL's text cannot hold the character NUL."""

    created_at: datetime = Field(sa_type=UtcTime)


class Sweep(Row, table=True):
    """Jobs that were submitted together to be compared: what they share, and what varies between them."""

    __tablename__ = "sweeps"
    __table_args__ = (
        Index("ix_sweeps_seq", "seq"),
        Index("ix_sweeps_owner", "owner", "seq"),
        Index("ix_sweeps_idempotency", "owner", "idempotency_key", unique=True,
              sqlite_where=text("idempotency_key IS NOT NULL"), postgresql_where=text("idempotency_key IS NOT NULL")),
    )  # fmt: skip

    id: str = Field(default_factory=new_id, primary_key=True)
    seq: int = Field(sa_type=BigInteger)
    """`Job.seq` of its first job, by which lists are sorted."""

    owner: str = ""
    """The user whose key submitted it; empty where no keys are used."""

    name: str | None = None
    tags: dict[str, str] = Field(default_factory=dict, sa_column=_json())
    created_at: datetime = Field(sa_type=UtcTime)
    config: dict[str, Any] = Field(sa_column=_json())
    """The knobs that its jobs have in common, as submitted."""

    parameters: list[dict[str, Any]] = Field(sa_column=_json())
    """What varies: `{"name", "values"}` each, in the order given. The name is a knob, `seed`, or `text`, whose values
    are SHA-256 digests."""

    idempotency_key: str | None = None
    request_sha256: str | None = None
    """SHA-256 of the request that came with the idempotency key, hexadecimal."""


class Job(Row, table=True):
    """A job: what was submitted, its place in the queue, the lease of the worker that runs it, its progress."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(f"status IN ({', '.join(repr(status) for status in STATUSES)})", name="status"),
        CheckConstraint(
            f"(status IN ({', '.join(repr(status) for status in TERMINAL)})) = (finished_at IS NOT NULL)",
            name="finished",
        ),
        CheckConstraint("(status = 'running') = (lease_until IS NOT NULL)", name="leased"),
        CheckConstraint("status <> 'running' OR worker_id IS NOT NULL", name="owned"),
        CheckConstraint("fence >= 0 AND attempt >= 0 AND crashes >= 0 AND event_seq >= 0", name="counts"),
        CheckConstraint("(waits_since IS NULL) = (waits_seconds IS NULL)", name="waits"),
        Index("ix_jobs_claim", text("priority DESC"), "seq",
              sqlite_where=text("status = 'queued'"), postgresql_where=text("status = 'queued'")),
        Index("ix_jobs_cohort", "cohort_key", "seq",
              sqlite_where=text("status = 'queued' AND cohort_key IS NOT NULL"),
              postgresql_where=text("status = 'queued' AND cohort_key IS NOT NULL")),
        Index("ix_jobs_lease", "lease_until",
              sqlite_where=text("status = 'running'"), postgresql_where=text("status = 'running'")),
        # By seq, not by status: SQLite would prefer an index that starts with the status to the claim's own, and sort.
        Index("ix_jobs_status", "seq", "status"),
        Index("ix_jobs_owner", "owner", "seq"),
        Index("ix_jobs_text", "text_sha256"),
        Index("ix_jobs_name", "name", sqlite_where=text("name IS NOT NULL"), postgresql_where=text("name IS NOT NULL")),
        Index("ix_jobs_parent", "parent_id"),
        Index("ix_jobs_sweep", "sweep_id", "seq",
              sqlite_where=text("sweep_id IS NOT NULL"), postgresql_where=text("sweep_id IS NOT NULL")),
        Index("ix_jobs_idempotency", "owner", "idempotency_key", unique=True,
              sqlite_where=text("idempotency_key IS NOT NULL"), postgresql_where=text("idempotency_key IS NOT NULL")),
    )  # fmt: skip

    id: str = Field(default_factory=new_id, primary_key=True)
    seq: int = Field(sa_type=BigInteger)
    """Number in the order of submission, in which jobs of equal priority are claimed and lists are sorted."""

    owner: str = ""
    """The user whose key submitted it; empty where no keys are used."""

    name: str | None = None
    tags: dict[str, str] = Field(default_factory=dict, sa_column=_json())
    status: Status = Field(default="queued", sa_type=AutoString)
    status_reason: str | None = None
    """Why the job is paused or waits, or succeeded before its last step."""

    priority: int = 0
    """Higher is claimed first."""

    run_at: datetime | None = Field(default=None, sa_type=UtcTime)
    """Time before which no worker claims the job; null where the user gave none."""

    waits_since: datetime | None = Field(default=None, sa_type=UtcTime)
    """Start of a wait of `waits_seconds` before the next attempt. The wait is over, too, when the clock shows a time
    before it, because it has been set back."""

    waits_seconds: float | None = Field(default=None, sa_type=Float)
    created_at: datetime = Field(sa_type=UtcTime)
    started_at: datetime | None = Field(default=None, sa_type=UtcTime)
    """When the first attempt was claimed."""

    finished_at: datetime | None = Field(default=None, sa_type=UtcTime)
    fence: int = 0
    """Raised by every claim: a write under a lower fence is refused."""

    attempt: int = 0
    crashes: int = 0
    """Abnormal ends since the last new checkpoint."""

    worker_id: str | None = None
    """The worker boot that runs it, or ran it last."""

    lease_until: datetime | None = Field(default=None, sa_type=UtcTime)
    lease_seconds: float | None = Field(default=None, sa_type=Float)
    """Length of the lease that the worker asked for. A lease that ends more than twice that ahead counts as expired."""

    cancel_requested_at: datetime | None = Field(default=None, sa_type=UtcTime)
    pause_requested_at: datetime | None = Field(default=None, sa_type=UtcTime)
    config: dict[str, Any] = Field(sa_column=_json())
    """The complete JobConfig, as JSON."""

    execution: dict[str, Any] | None = Field(default=None, sa_column=_json(nullable=True))
    """Device, precision and code paths, decided at the first start and used by every later attempt; `micro_batch`
    shrinks when memory runs out."""

    progress: dict[str, Any] = Field(default_factory=dict, sa_column=_json())
    text_sha256: str = Field(foreign_key="texts.sha256")
    text_n_bytes: int = Field(sa_type=BigInteger)
    n_tokens: int | None = Field(default=None, sa_type=BigInteger)
    total_steps: int | None = Field(default=None, sa_type=BigInteger)
    n_params: int | None = Field(default=None, sa_type=BigInteger)
    n_active_params: int | None = Field(default=None, sa_type=BigInteger)
    training_bytes: int | None = Field(default=None, sa_type=BigInteger)
    """Memory that training needs at least, however it is cut; a worker with less does not claim it. Null fits all."""

    cohort_key: str | None = None
    """Shape of the job (`nanomoe.cohort_shape`): queued jobs of one shape may be claimed together, to be trained by one
    trainer. Null for a job that is trained alone: its shape is not known, is too large, or its trainer crashed."""

    cohort_id: str | None = None
    """What the jobs have in common that the last claim claimed together; null where it claimed this one alone."""

    cohort_size: int | None = None
    """How many jobs the last claim claimed together; null where it claimed this one alone."""

    cohort_most: int | None = None
    """How many jobs may be claimed together with this one among them, after memory ran out for more."""

    warnings: list[dict[str, Any]] = Field(default_factory=list, sa_column=_json())
    error: dict[str, Any] | None = Field(default=None, sa_column=_json(nullable=True))
    """`{"code", "message"}` of a failed job."""

    parent_id: str | None = Field(default=None, foreign_key="jobs.id")
    parent_percent: int | None = None
    sweep_id: str | None = Field(default=None, foreign_key="sweeps.id")
    idempotency_key: str | None = None
    request_sha256: str | None = None
    """SHA-256 of the request that came with the idempotency key, hexadecimal."""

    event_seq: int = Field(default=0, sa_type=BigInteger)
    """Number of the job's newest event."""


class Counter(Row, table=True):
    """A number that only grows. The transaction that raises it locks the row until its commit, so that numbers are
    committed in their order."""

    __tablename__ = "counters"

    name: str = Field(primary_key=True)
    """`jobs`: the `seq` of the newest job. On SQLite `events`: the `number` of the newest event."""

    value: int = Field(sa_type=BigInteger)


class Checkpoint(Row, table=True):
    """A recorded checkpoint: the row exists only once all files do."""

    __tablename__ = "checkpoints"
    __table_args__ = (
        CheckConstraint(f"percent IN {PERCENTS}", name="percent"),
        # All that a sum of bytes reads: the rows themselves may be large.
        Index("ix_checkpoints_bytes", "job_id", "n_bytes"),
    )

    job_id: str = Field(sa_column=_job_key())
    percent: int = Field(primary_key=True)
    step: int = Field(sa_type=BigInteger)
    epoch: float = Field(sa_type=Float)
    created_at: datetime = Field(sa_type=UtcTime)
    fence: int
    folder: str
    """Relative to the data folder."""

    manifest_sha256: str
    files: list[dict[str, Any]] = Field(sa_column=_json())
    """`{"name", "size", "sha256"}` of each file."""

    n_bytes: int = Field(default=0, sa_type=BigInteger, sa_column_kwargs={"server_default": "0"})
    """Size of all files."""

    metrics: dict[str, Any] = Field(sa_column=_json())
    """Figures of the checkpoint, without what has a column of its own."""

    reconstruction: dict[str, Any] | None = Field(default=None, sa_column=_json(nullable=True))
    """Prediction for every target. Apart from `metrics`, so that a comparison of many checkpoints reads none."""

    moe: dict[str, Any] | None = Field(default=None, sa_column=_json(nullable=True))
    """Figures of the routers; null for a dense model. Apart from `metrics` for the same reason."""


LARGE_METRICS = ("reconstruction", "moe")
"""The parts of a checkpoint's metrics that have columns of their own. A worker of an earlier version leaves them in
`metrics`."""


class Snapshot(Row, table=True):
    """The newest state that a killed job resumes from; at most one per job."""

    __tablename__ = "snapshots"

    job_id: str = Field(sa_column=_job_key())
    step: int = Field(sa_type=BigInteger)
    created_at: datetime = Field(sa_type=UtcTime)
    fence: int
    folder: str
    """Relative to the data folder."""

    manifest_sha256: str


class Step(Row, table=True):
    """One optimizer step's figures. Null stands for a figure that was not finite."""

    __tablename__ = "steps"
    __table_args__ = _WITHOUT_ROWID

    job_id: str = Field(sa_column=_job_key())
    step: int = Field(sa_type=BigInteger, primary_key=True)
    train_loss: float | None = Field(default=None, sa_type=Float)
    lr: float | None = Field(default=None, sa_type=Float)
    grad_norm: float | None = Field(default=None, sa_type=Float)


class StepBlock(Row, table=True):
    """Minimum and maximum of each column over `size` steps, from step `block * size`: read to thin a series."""

    __tablename__ = "step_blocks"
    __table_args__ = _WITHOUT_ROWID

    job_id: str = Field(sa_column=_job_key())
    size: int = Field(primary_key=True)
    block: int = Field(sa_type=BigInteger, primary_key=True)
    extremes: dict[str, list[Any]] = Field(sa_column=_json())
    """`{column: [minimum, its step, maximum, its step]}`; a column without a figure is absent."""


class Attempt(Row, table=True):
    """How long an owner's job used a device. It outlives the job: to delete one gives no seconds back."""

    __tablename__ = "attempts"
    __table_args__ = (Index("ix_attempts_owner", "owner", "ended_at"),)

    job_id: str = Field(primary_key=True)
    fence: int = Field(primary_key=True)
    owner: str
    started_at: datetime = Field(sa_type=UtcTime)
    ended_at: datetime | None = Field(default=None, sa_type=UtcTime)
    """Null while it runs."""


class Envelope(Row, table=True):
    """The smallest and the largest training loss of a job in at most 100 stretches of equal length: what a chart of
    many jobs needs, in one row a job."""

    __tablename__ = "envelopes"

    job_id: str = Field(sa_column=_job_key())
    width: int = Field(sa_type=BigInteger)
    """Steps of a bucket, a power of two: bucket b holds the steps b * width + 1 to (b + 1) * width."""

    last_step: int = Field(sa_type=BigInteger)
    """The last step that is in it."""

    train_loss: list[list[Any]] = Field(sa_column=_json())
    """Minima and maxima by bucket, `[[...], [...]]`, with five significant digits; null in a bucket without any."""


EVENT_COUNTER = "events"
"""The counter that numbers events on SQLite."""

EVENT_NUMBERS = Sequence("event_numbers", metadata=Row.metadata)
"""The sequence that numbers events on PostgreSQL."""


class Event(Row, table=True):
    """An event of a job, numbered from 1 in each job, and increasing through those of all jobs."""

    __tablename__ = "events"
    __table_args__ = (
        Index("ix_events_number", "number", unique=True),
        Index("ix_events_sweep", "sweep_id", "number",
              sqlite_where=text("sweep_id IS NOT NULL"), postgresql_where=text("sweep_id IS NOT NULL")),
    )  # fmt: skip

    job_id: str = Field(sa_column=_job_key())
    seq: int = Field(sa_type=BigInteger, primary_key=True)
    kind: str
    """`status`, `checkpoint` or `warning`."""

    created_at: datetime = Field(sa_type=UtcTime)
    data: dict[str, Any] = Field(sa_column=_json())
    sweep_id: str | None = None
    """The sweep of the job, if it has one."""

    number: int = Field(sa_type=BigInteger)
    """Its place among the events of all jobs. Two transactions at once may commit against this order."""


class Worker(Row, table=True):
    """One boot of a worker process. The next boot has the same name and another id."""

    __tablename__ = "workers"

    id: str = Field(primary_key=True)
    name: str
    host: str
    pid: int
    slots: int
    lease_seconds: float = Field(sa_type=Float)
    """Length of its leases, and how long after it was last seen it counts as alive."""

    devices: list[dict[str, Any]] = Field(sa_column=_json())
    """`{"device", "name", "memory_bytes", "cohort"}` of each device; `cohort`: most jobs of one shape that a trainer on
    it trains together, which rows of earlier versions do not have."""

    versions: dict[str, str] = Field(sa_column=_json())
    started_at: datetime = Field(sa_type=UtcTime)
    last_seen_at: datetime = Field(sa_type=UtcTime)
    stopped_at: datetime | None = Field(default=None, sa_type=UtcTime)


class Installation(Row, table=True):
    """The id that the database shares with its data folder; one row."""

    __tablename__ = "installation"

    id: str = Field(primary_key=True)
    created_at: datetime = Field(sa_type=UtcTime)
