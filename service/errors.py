"""The service's exceptions, each with a stable code. Knows no HTTP framework: one handler of the API turns them into
`application/problem+json`, and the worker handles the same classes.

    Exception
    +-- ServiceError                 answers a request with `status` and `code`
    |   +-- Unauthorized             401  key_required, key_invalid, too_many_attempts
    |   +-- Forbidden                403  origin_not_allowed, host_not_allowed, role_not_allowed
    |   +-- NotFound                 404  job_not_found, text_not_found, checkpoint_not_found, file_not_found, ...
    |   +-- Conflict                 409  job_not_finished, has_dependents, no_checkpoint_yet, not_cancellable, ...
    |   |   +-- Ambiguous                 ambiguous_job, ambiguous_sweep
    |   +-- TooLarge                 413  body_too_large, text_too_large
    |   +-- Invalid                  422  invalid_request, invalid_text, idempotency_key_reused, job_too_large, ...
    |   +-- TooManyRequests          429  queue_full, generation_queue_full
    |   |   +-- QuotaExceeded             quota_exceeded
    |   +-- Unavailable              503  generation_unavailable, store_unavailable, store_refused, ...
    |   |   +-- DatabaseUnavailable       database_unavailable
    |   |   |   +-- TransactionBlocked  database_unavailable: others held its rows
    |   |   +-- SchemaMismatch            schema_mismatch
    |   +-- StorageFull              507  storage_full
    +-- LeaseLost                    the job is no longer this worker's: kill the trainer, write nothing
    +-- StartRefused                 this process must not start; the text says why and what to do
        +-- NotInstalled             not yet: a worker waits until the API has started once
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal


class ServiceError(Exception):
    """Base class: a problem (RFC 9457). `status` and `title` belong to the class, `code` and `detail` to the
    occurrence."""

    status: ClassVar[int] = 500
    title: ClassVar[str] = "Error"

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        errors: Sequence[dict[str, Any]] = (),
        retry_after: float | None = None,
    ) -> None:
        """`errors`: `{"loc": [...], "msg": ...}` of each faulty field. `retry_after`: seconds, for the header."""
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.errors = list(errors)
        self.retry_after = retry_after


class Unauthorized(ServiceError):
    """The request needs a key, and came without a valid one."""

    status = 401
    title = "A key is needed"


class Forbidden(ServiceError):
    status = 403
    title = "Not allowed"


class NotFound(ServiceError):
    status = 404
    title = "Not found"


class Conflict(ServiceError):
    status = 409
    title = "Not allowed in this state"


class Ambiguous(Conflict):
    """Several jobs, or several sweeps, fit the name or the beginning of an id that stood for one: nothing was done."""

    title = "Several may be meant"

    def __init__(self, noun: Literal["job", "sweep"], detail: str, candidates: Sequence[Any]) -> None:
        """`candidates`: those that fit, the newest first, each with `id`, `name`, `status` and `created_at`."""
        super().__init__(f"ambiguous_{noun}", detail)
        self.candidates = list(candidates)


class TooLarge(ServiceError):
    status = 413
    title = "Too large"


class Invalid(ServiceError):
    status = 422
    title = "The request is not valid"


class TooManyRequests(ServiceError):
    status = 429
    title = "Too many requests"


class QuotaExceeded(TooManyRequests):
    """The owner has used up a quota: nothing was done."""

    title = "A quota is used up"

    def __init__(self, name: str, limit: float, used: float, *, wanted: float | None = None) -> None:
        """`wanted`: how much more the request would have used, where that is known."""
        self.name = name
        self.limit = limit
        self.used = used
        takes = "" if wanted is None else f", and this takes {wanted:,}"
        detail = f"{name}: of {limit:,}, {used:,} are used and {self.left:,} are left{takes}"
        super().__init__("quota_exceeded", detail)

    @property
    def left(self) -> float:
        """How much of the quota is left."""
        return max(0, self.limit - self.used)


class Unavailable(ServiceError):
    status = 503
    title = "Unavailable for now"


def store_out_of_reach(code: str) -> Unavailable:
    """The answer to a request that needs files which cannot be read or written now; `code`: the `StoreError`'s. Where
    the store lies, and what exactly it said, is for the log."""
    return Unavailable(code, "the store of files cannot be reached, or does not let the service in", retry_after=5)


class DatabaseUnavailable(Unavailable):
    """The database is out of reach, locked for too long, or aborted the transaction. Nothing was written, except that a
    connection which broke during a commit leaves its outcome unknown."""

    def __init__(self, detail: str, *, retry_after: float = 5) -> None:
        super().__init__("database_unavailable", detail, retry_after=retry_after)


class TransactionBlocked(DatabaseUnavailable):
    """The database is there, but other transactions held rows of this one for too long, or waited for it in a circle.
    Nothing was written."""


class SchemaMismatch(Unavailable):
    """The database is at another schema revision than this code: wait for the API to migrate, or update this code."""

    def __init__(self, found: str | None, wanted: str) -> None:
        super().__init__(
            "schema_mismatch",
            f"the database is at schema revision {found}, this code is written for {wanted}",
            retry_after=5,
        )


class StorageFull(ServiceError):
    """The disk of the database is full. Nothing was written; reads still work."""

    status = 507
    title = "The disk is full"

    def __init__(self, detail: str) -> None:
        super().__init__("storage_full", detail)


class LeaseLost(Exception):
    """The job was claimed by another worker, ended or was released: the caller's lease on it has ended."""


class StartRefused(Exception):
    """Starting would risk data; the text says why, and how to correct it."""


class NotInstalled(StartRefused):
    """The database has no installation id yet: the API gives it one when it has migrated."""
