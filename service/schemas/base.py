"""What all answers share: how they are read, how lists come in pages, and what an error looks like."""

from typing import Annotated, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict

Status = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
TERMINAL: frozenset[Status] = frozenset({"succeeded", "failed", "cancelled"})

Percent = Literal[0, 25, 50, 75, 100]

BYTE_ORDER_MARK = "\ufeff"


def _without_mark(given: object) -> object:
    return given.removeprefix(BYTE_ORDER_MARK) if isinstance(given, str) else given


Text = Annotated[str, BeforeValidator(_without_mark)]
"""What is read from files: a byte-order mark at its start says how the file is encoded, and is no part of the text."""

T = TypeVar("T")


class View(BaseModel):
    """A frozen answer. Fields that this version does not know are left out."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Page(View, Generic[T]):
    """One page of a list, newest first."""

    data: list[T]
    """The entries."""

    next_cursor: str | None
    """Ask with `cursor=` for the next page; null at the end."""


class Listing(View, Generic[T]):
    """A list short enough for one page."""

    data: list[T]
    """The entries."""


class ProblemError(View):
    """One thing that is wrong with a request."""

    loc: list[str | int]
    """Where: `body`, `query`, `path` or `header`, then the path to the field."""

    msg: str
    """What is wrong there."""


class Problem(View):
    """An error (RFC 9457, `application/problem+json`)."""

    type: str
    """`about:blank`, or an address that names the problem."""

    title: str
    """The status in words."""

    status: int
    """The HTTP status."""

    detail: str
    """What went wrong this time."""

    code: str
    """Stable and machine-readable."""

    errors: list[ProblemError] = []
    """Each thing that is wrong, for an invalid request."""
