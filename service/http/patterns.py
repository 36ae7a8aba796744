"""Patterns of ids, names and keys, each with its error message, so that no error shows a regular expression."""

from collections.abc import Mapping
from typing import Any

from nanomoe.config import JOB_ID_PATTERN, JOB_REFERENCE_PATTERN

PRINTABLE = r"^[^\x00-\x1f\x7f]+$"
PRINTABLE_OR_EMPTY = r"^[^\x00-\x1f\x7f]*$"
TAG_KEY = r"^[A-Za-z0-9_.-]+$"
TAG = r"^[A-Za-z0-9_.-]{1,64}([=:][^\x00-\x1f\x7f]{0,200})?$"
"""A tag filter: a key, and optionally `=` or `:` and a value, which may contain both."""
IDEMPOTENCY_KEY = r"^[\x21-\x7e]+$"
ID_PREFIX = r"^[0-9a-f]{1,32}$"
SEQUENCE_NUMBER = r"^[0-9]{1,18}$"
AT_STEP = r"^step:[0-9]{1,18}$"

_MESSAGES = {
    JOB_ID_PATTERN: "must be 32 hexadecimal digits, in lower case",
    JOB_REFERENCE_PATTERN: "must be an id, a name, or the beginning of an id, without control characters",
    ID_PREFIX: "must be the first digits of an id: 1 to 32 hexadecimal digits, in lower case",
    PRINTABLE: "must not hold control characters, such as line ends",
    PRINTABLE_OR_EMPTY: "must not hold control characters, such as line ends",
    TAG_KEY: "must consist of the letters A to Z and a to z, digits, _, . and -",
    TAG: "must look like key or key=value, the key of at most 64 letters A to Z and a to z, digits, _, . and -",
    IDEMPOTENCY_KEY: "must consist of visible ASCII characters, without spaces",
    AT_STEP: "must look like step:200",
    SEQUENCE_NUMBER: "must be a number of at most 18 digits",
}


def message_of(error: Mapping[str, Any]) -> str:
    """The message of one of pydantic's errors, with words in place of a pattern."""
    if error.get("type") == "string_pattern_mismatch":
        return _MESSAGES.get(error["ctx"]["pattern"], "does not have the required form")
    message: str = error["msg"]
    return message
