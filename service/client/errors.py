"""The client's exceptions, one class for each way in which a caller may react.

    ClientError
    ├── Unreachable        no answer: not started, another address, or a time-out
    ├── UnexpectedAnswer   an answer that is not of this HTTP contract
    └── Problem            the service refused, with a problem document (RFC 9457)
        ├── Invalid        400, 413, 422: the request itself is wrong; `errors` names the fields
        ├── Forbidden      401, 403: no key, a wrong key, or a foreign origin
        ├── NotFound       404: no such job, checkpoint or file
        ├── Conflict       409: the job's state does not allow it, or several `candidates` may be meant
        └── Unavailable    429, 5xx: temporarily; `retry_after` seconds if the service named them

Knows no request and no command line.
"""

from typing import Any

import httpx
from pydantic import ValidationError

from service.http import schemas


class ClientError(Exception):
    """Everything that the client raises about the service derives from this."""


class Unreachable(ClientError):
    """No answer: nothing listens at this address, or the request timed out."""

    def __init__(self, message: str, address: str | None = None) -> None:
        super().__init__(message)
        self.address = address
        """Address at which nothing listens; None when the connection was made and then broke."""


NO_ANSWER = (ClientError, RuntimeError)
"""What is raised where a request has no answer: the client's errors, and httpx's RuntimeError of a closed client."""


class UnexpectedAnswer(ClientError):
    """An answer that is not of this HTTP contract, from another program or another version."""


class Problem(ClientError):
    """The service refused the request, with a problem document."""

    def __init__(self, problem: schemas.Problem, retry_after: float | None = None) -> None:
        super().__init__(problem.detail or problem.title)
        self.problem = problem
        self.retry_after = retry_after
        """Seconds after which the request may be repeated; None when the service named none."""

    @property
    def code(self) -> str:
        """Stable, machine-readable error code, such as `job_not_found`."""
        return self.problem.code

    @property
    def status(self) -> int:
        """HTTP status of the response."""
        return self.problem.status

    @property
    def detail(self) -> str:
        """Explanation of the error in one sentence."""
        return str(self)

    @property
    def errors(self) -> list[Any]:
        """Faults of an invalid request: location (`loc`) and message (`msg`) of each."""
        return list(self.problem.errors)

    @property
    def candidates(self) -> list[schemas.JobCandidate]:
        """With `ambiguous_job`, the jobs that may have been meant."""
        return list(self.problem.candidates)


class Invalid(Problem):
    """The request is invalid: repeating it will not succeed."""


class Forbidden(Problem):
    """No key, a wrong key, or a foreign origin."""


class NotFound(Problem):
    """No such job, checkpoint or file."""


class Conflict(Problem):
    """The state of the job does not allow the request, or several jobs may be meant: `candidates`."""


class Unavailable(Problem):
    """The service is temporarily unavailable or overloaded."""


_BY_STATUS: dict[int, type[Problem]] = {401: Forbidden, 403: Forbidden, 404: NotFound, 409: Conflict, 429: Unavailable}


def problem_of(response: httpx.Response) -> ClientError:
    """The exception for a response whose status is 400 or more and whose body has been read."""
    try:
        problem = schemas.Problem.model_validate_json(response.content)
    except ValidationError:
        return UnexpectedAnswer(
            f"{response.request.url} answered {response.status_code} without a problem document: "
            "is something else listening at this address?"
        )
    after = response.headers.get("Retry-After", "")
    return exception_of(problem, float(after) if after.isdecimal() else None)


def exception_of(problem: schemas.Problem, retry_after: float | None = None) -> Problem:
    """The exception for a problem document."""
    kind = _BY_STATUS.get(problem.status, Unavailable if problem.status >= 500 else Invalid)
    return kind(problem, retry_after)
