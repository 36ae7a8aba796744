"""Fenced blocks of a Markdown file, whether a printed answer is the one that stands below a command, and its links.

A block is run unless an HTML comment right above it says `not run: why` or `stays running`. A `json` or `text` block
right below a command is its answer. What no two runs share is masked (ids, hashes, times, speeds); fractions may differ
by `TOLERANCE`; `...` stands for whatever is left out.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from typing import Any

TOLERANCE = 0.03
"""Relative: losses of equal runs differ a little between processors."""

VARIABLE = frozenset(
    {"tok_per_sec", "eta_seconds", "queue_seconds", "first_token_seconds", "device_name", "instruction_set"}
    | {"n_threads", "torch_version", "host", "pid", "version", "memory_bytes"}
)
"""JSON keys whose values belong to one machine or one moment."""

MASKS = (
    (r"\b[0-9a-f]{64}\b", "SHA256"),
    (r"\b[0-9a-f]{32}\b", "ID"),
    (r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)?", "TIME"),
    (r"\b[\d,.]+ tok/s", "SPEED"),
    (r"(?m)^( *\d+ % +[\d,]+ .*?) +[\d,]+$", r"\1 SPEED"),
    (r"\b(\d+ min )?[\d,.]+ ?(ms|s|seconds)\b", "DURATION"),
    (r"(/[\w.-]+)+/(nanomoe-demo-\w+|data)\b", "FOLDER"),
    (r"127\.0\.0\.1:\d+", "ADDRESS"),
)
NUMBER = re.compile(r"(-?\d[\d,]*\.\d+(?:e-?\d+)?)")
FENCED = re.compile(r"(?:^<!-- ([^\n]*) -->\n+)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block, and the answer below it."""

    language: str
    text: str
    line: int
    """Where it opens, from 1."""

    note: str = ""
    """The HTML comment right above it."""

    answer: "Block | None" = None

    @property
    def is_run(self) -> bool:
        """Whether its commands are to be run."""
        return self.language in ("sh", "python") and not self.note.startswith("not run: ")

    @property
    def stays_running(self) -> bool:
        """Whether it is a server that the blocks below talk to."""
        return self.note == "stays running"


def blocks(text: str) -> list[Block]:
    """The blocks of a Markdown text, in order; answers are found at their command only."""
    found: list[Block] = []
    end = 0
    for match in FENCED.finditer(text):
        note, language, content = match.groups(default="")
        block = Block(language, content, text.count("\n", 0, match.start(2)) + 1, note)
        if found and found[-1].is_run and language in ("json", "text") and not text[end : match.start()].strip():
            found[-1] = replace(found[-1], answer=block)
        else:
            found.append(block)
        end = match.end()
    assert len(re.findall("^```", text, re.MULTILINE)) == 2 * len(FENCED.findall(text)), "a fence is never closed"
    return found


def links(text: str) -> list[str]:
    """The targets of a Markdown text's links and pictures, files of this project and headings, in order."""
    targets = [
        link or picture for link, picture in re.findall(r'\]\(([^)\s]+)\)|\bsrc(?:set)?="([^"\s]+)"', _prose(text))
    ]
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def slugs(text: str) -> set[str]:
    """The anchors of a Markdown text's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", _prose(text), re.MULTILINE):
        slug = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        n_before = sum(1 for other in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other))
        found.add(f"{slug}-{n_before}" if n_before else slug)
    return found


def _prose(text: str) -> str:
    """The text without its fenced blocks."""
    return FENCED.sub("", text)


def masked(text: str) -> str:
    """The text without what differs from run to run."""
    for pattern, name in MASKS:
        text = re.sub(pattern, name, text)
    return text


def differences(expected: Block, printed: str) -> list[str]:
    """What is wrong with an answer; empty when it is the expected one."""
    if expected.language == "json":
        try:
            return list(_differ(json.loads(expected.text), json.loads(printed), "answer"))
        except ValueError as error:
            return [f"not JSON ({error}): {printed[:500]}"]
    return _differ_in_text(expected.text, printed)


def _differ(expected: Any, found: Any, where: str) -> list[str]:
    match expected, found:
        case "...", _:
            return []
        case dict(), dict():
            open_end = "..." in expected
            wanted = {key: value for key, value in expected.items() if key != "..."}
            wrong = [f"{where}.{key} is missing" for key in wanted.keys() - found.keys()]
            wrong += [f"{where}.{key} is not told" for key in found.keys() - wanted.keys() if not open_end]
            for key in wanted.keys() & found.keys():
                if key not in VARIABLE:
                    wrong += _differ(wanted[key], found[key], f"{where}.{key}")
            return wrong
        case list(), list():
            open_end = expected[-1:] == ["..."]
            wanted_items = expected[:-1] if open_end else expected
            if len(found) < len(wanted_items) or (len(found) > len(wanted_items) and not open_end):
                return [f"{where} has {len(found)} items, not {len(wanted_items)}: {found}"]
            return [
                difference
                for index, (one, other) in enumerate(zip(wanted_items, found, strict=False))
                for difference in _differ(one, other, f"{where}[{index}]")
            ]
        case str(), str():
            return [f"{where}: {line}" for line in _differ_in_text(expected, found)]
        case (float(), float() | int()) | (int(), float()):
            return [] if _close_to(expected, found) else [f"{where} is {found}, not {expected}"]
    return [] if expected == found and type(expected) is type(found) else [f"{where} is {found!r}, not {expected!r}"]


def _close_to(expected: float, found: float) -> bool:
    return math.isclose(expected, found, rel_tol=TOLERANCE, abs_tol=1e-9)


def _differ_in_text(expected: str, printed: str) -> list[str]:
    wanted, found = masked(expected).rstrip(), masked(printed).rstrip()
    # Fractions are compared as numbers, all else letter by letter, but for how wide the blanks are.
    pattern = "".join(
        NUMBER.pattern if index % 2 else _pattern(part) for index, part in enumerate(NUMBER.split(wanted))
    )
    matched = re.fullmatch(pattern, found, re.DOTALL)
    if matched is None:
        return [f"expected\n{wanted}\nbut it printed\n{found}"]
    pairs = zip(NUMBER.findall(wanted), matched.groups(), strict=True)
    return [
        f"{other} instead of {one}"
        for one, other in pairs
        if not _close_to(float(one.replace(",", "")), float(other.replace(",", "")))
    ]


def _pattern(text: str) -> str:
    literal = ".*?".join(re.escape(part) for part in re.split(r"\s*\.\.\.\s*", text))
    return re.sub(r"(\\ )+", " +", literal)
