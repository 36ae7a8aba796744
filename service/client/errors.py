"""What can go wrong between a client and the service, one class for each thing a caller may do about it.

    ClientError
    ├── Unreachable        nobody answered: not started, another address, or the answer took too long
    ├── UnexpectedAnswer   something answered that does not speak this contract
    └── Problem            the service said no, and why (RFC 9457)
        ├── Invalid        400, 413, 422: the request itself is wrong; `errors` names the fields
        ├── Forbidden      401, 403: no key, a wrong key, or a foreign origin
        ├── NotFound       404: no such job, checkpoint or file
        ├── Conflict       409: not in this state of the job
        └── Unavailable    429, 5xx: the service cannot right now; `retry_after` seconds if it said so

Knows no request and no command line.
"""

from typing import Any

import httpx
from pydantic import ValidationError

from service.http import schemas


class ClientError(Exception):
    """Everything that the client raises about the service derives from this."""


class Unreachable(ClientError):
    """No answer: nobody listens at this address, or the answer took too long."""

    def __init__(self, message: str, address: str | None = None) -> None:
        super().__init__(message)
        self.address = address
        """Where nobody listens; None when somebody did, and the exchange broke off."""


class UnexpectedAnswer(ClientError):
    """An answer that this contract does not know, from another program or another version."""


class Problem(ClientError):
    """The service refused, and said why."""

    def __init__(self, problem: schemas.Problem, retry_after: float | None = None) -> None:
        super().__init__(problem.detail or problem.title)
        self.problem = problem
        self.retry_after = retry_after
        """Seconds after which asking again makes sense; None when the service named none."""

    @property
    def code(self) -> str:
        """Stable and machine-readable, such as `job_not_found`."""
        return self.problem.code

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.problem.status

    @property
    def detail(self) -> str:
        """One sentence for a person."""
        return str(self)

    @property
    def errors(self) -> list[Any]:
        """For an `Invalid`: where each fault lies (`loc`) and what it is (`msg`)."""
        return list(self.problem.errors)


class Invalid(Problem):
    """The request itself is wrong: the same request will never succeed."""


class Forbidden(Problem):
    """No key, a wrong key, or a foreign origin."""


class NotFound(Problem):
    """No such job, checkpoint or file."""


class Conflict(Problem):
    """Not in this state of the job."""


class Unavailable(Problem):
    """The service cannot answer right now; later it may."""


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
