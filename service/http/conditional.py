"""Conditional and range requests (RFC 9110, 13 and 14): content that the client has is not sent again.

Knows no route and no file.
"""

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.http import problems

_ETAG = re.compile(r'(W/)?("[^"]*")')
_RANGE = re.compile(r"([0-9]*)-([0-9]*)")
_KEPT = ("etag", "cache-control", "last-modified")
_MOST_DIGITS = 19


def evaluate_preconditions(scope: Scope, headers: Headers) -> Response | None:
    """The response to a `GET` whose preconditions fail (412) or whose content the client has (304); None for the full
    response.

    `headers`: those of the full response, with its `ETag` and, where it has one, its `Last-Modified`.
    """
    asked, etag, modified = Headers(scope=scope), headers["etag"], _date(headers.get("last-modified"))
    if (if_match := asked.get("if-match")) is not None:
        is_met = if_match.strip() == "*" or etag in _etags(if_match, weak=False)
    else:
        unmodified_since = _date(asked.get("if-unmodified-since"))
        is_met = modified is None or unmodified_since is None or modified <= unmodified_since
    if not is_met:
        return problems.respond(
            scope["path"], 412, "precondition_failed", "the content has changed, or does not match the precondition"
        )
    if (if_none_match := asked.get("if-none-match")) is not None:
        is_held = if_none_match.strip() == "*" or etag in _etags(if_none_match, weak=True)
    else:
        modified_since = _date(asked.get("if-modified-since"))
        is_held = modified is not None and modified_since is not None and modified <= modified_since
    if not is_held:
        return None
    return Response(status_code=304, headers={name: headers[name] for name in _KEPT if name in headers})


def wanted_ranges(scope: Scope, headers: Headers, size: int) -> list[tuple[int, int]] | None:
    """The ranges of `size` bytes that a request asks for, as (first, last); empty where none of them lies inside.

    None where it asks for no range, or for one that must be ignored: in another unit, or of another version.
    """
    asked = Headers(scope=scope)
    unit, equals, specs = asked.get("range", "").partition("=")
    if not equals or unit.strip().lower() != "bytes":
        return None
    if asked.get("if-range", headers["etag"]) not in (headers["etag"], headers.get("last-modified")):
        return None
    ranges = []
    for spec in filter(None, map(str.strip, specs.split(","))):
        found = _RANGE.fullmatch(spec)
        if found is None or spec == "-":
            return []
        first, last = (_number(digits) for digits in found.groups())
        if first is None:
            assert last is not None
            first, last = max(0, size - last), size - 1
        elif last is None:
            last = size - 1
        elif first > last:
            return []
        if first < size:
            ranges.append((first, min(last, size - 1)))
    return ranges


class ConditionalResponse(Response):
    """A response with an `ETag`, which is not sent to a client that has its content."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the full response, or the one that the request's preconditions demand."""
        answer = evaluate_preconditions(scope, self.headers)
        if answer is None:
            await super().__call__(scope, receive, send)
        else:
            await answer(scope, receive, send)


def _etags(listed: str, *, weak: bool) -> set[str]:
    """The entity tags of a list; `weak`: with the weak ones, which stand for equivalent content, not for equal
    bytes."""
    return {tag for mark, tag in _ETAG.findall(listed) if weak or not mark}


def _date(given: str | None) -> datetime | None:
    """An HTTP date; None for no date and for a malformed one, which must be ignored."""
    try:
        found = parsedate_to_datetime(given or "")
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _number(digits: str) -> int | None:
    # A number of more digits lies behind the end of any file.
    return int(digits.lstrip("0")[:_MOST_DIGITS] or "0") if digits else None
