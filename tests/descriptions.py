"""The rule for descriptions that users read: fields of the OpenAPI document, options of the command line."""

import re

LEANS_ON_SOMETHING = re.compile(
    r"(of|its|their|both|always|as|that|those|this|these|they|it|null|from|at|in|by|never|such|see|ditto)\b"
    r"|(when|why|how|what|where|whether)( \w+)? (it|its|they|this)\b"
    r"|the (entries|same as|above)\b",
    re.IGNORECASE,
)


def stands_alone(text: str | None) -> bool:
    """Whether a description is a noun phrase or sentence of three words or more that names what it is about."""
    return (
        text is not None
        and len(text.split()) >= 3
        and text.rstrip().endswith((".", "`"))
        and not LEANS_ON_SOMETHING.match(text)
        and not text.startswith("Successful Response")
    )
