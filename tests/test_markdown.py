"""The documents' own checker: it lets pass what may differ, and nothing else."""

import pytest

from tests.markdown import Block, blocks, differences, links, slugs

DOCUMENT = """\
Text.

```sh
first
```
```json
{"a": 1}
```

<!-- not run: it would take a day -->
```sh
second
```

<!-- stays running -->

```sh
third
```

Prose between.

```text
no answer of third
```
"""


def test_blocks_come_in_order_with_their_notes_and_answers() -> None:
    first, second, third, loose = blocks(DOCUMENT)
    assert (first.text, first.line, first.is_run) == ("first\n", 3, True)
    assert first.answer is not None
    assert first.answer.text == '{"a": 1}\n'
    assert not second.is_run
    assert third.stays_running
    assert third.answer is None
    assert loose.language == "text"


def test_an_open_fence_is_seen() -> None:
    with pytest.raises(AssertionError, match="never closed"):
        blocks("```sh\nmake\n")


@pytest.mark.parametrize(
    ("language", "expected", "printed"),
    [
        ("json", '{"id": "' + "0" * 32 + '", "...": "..."}', '{"id": "' + "f" * 32 + '", "more": 1}'),
        ("json", '{"loss": 5.10}', '{"loss": 5.11}'),
        ("json", '{"tok_per_sec": 1.0}', '{"tok_per_sec": 9000.0}'),
        ("json", '{"at": "2026-01-01T00:00:00Z"}', '{"at": "2027-02-03T04:05:06.789Z"}'),
        ("json", '[1, "..."]', "[1, 2, 3]"),
        ("json", '{"steps": "..."}', '{"steps": [1, 2, 3]}'),
        ("text", "loss 5.10   at step 125\n", "loss  5.12 at step 125\n"),
        ("text", "start ... end", "start\nmiddle\nend"),
        ("text", "  25 %    50   0.79   100.0 %    1,666", "  25 %    50   0.79   100.0 %       51"),
        ("text", "took 1.2 s, 3,900 tok/s", "took 12 s, 51.3 tok/s"),
    ],
)
def test_what_varies_may_differ(language: str, expected: str, printed: str) -> None:
    assert differences(Block(language, expected, 1), printed) == []


@pytest.mark.parametrize(
    ("language", "expected", "printed"),
    [
        ("json", '{"status": "queued"}', '{"status": "running"}'),
        ("json", '{"a": 1}', '{"a": 1, "b": 2}'),
        ("json", '{"a": 1, "...": "..."}', '{"b": 1}'),
        ("json", '{"loss": 5.10}', '{"loss": 6.10}'),
        ("json", '{"loss": 5.10}', '{"loss": null}'),
        ("json", '{"n": 1}', '{"n": 2}'),
        ("json", '{"yes": true}', '{"yes": 1}'),
        ("json", "[1, 2]", "[1]"),
        ("json", '{"a": 1}', "Internal Server Error"),
        ("text", "loss 5.10", "loss 6.10"),
        ("text", "  25 %    50   0.79   100.0 %    1,666", "  25 %    51   0.79   100.0 %    1,666"),
        ("text", "step 125", "step 126"),
        ("text", "one line", "one line\nand another"),
    ],
)
def test_what_must_not_differ_is_seen(language: str, expected: str, printed: str) -> None:
    assert differences(Block(language, expected, 1), printed)


LINKED = """\
# The *first* one, of `two`

[here](#the-first-one), [there](docs/page.md#part) and [away](https://example.org/#x)

```sh
# no heading, and [no link](nowhere.md)
```

## Part

## Part
"""


def test_links_are_those_within_the_project() -> None:
    assert links(LINKED) == ["#the-first-one", "docs/page.md#part"]
    assert links('<source srcset="docs/dark.webp"><img alt="a job" src="docs/light.webp">') == [
        "docs/dark.webp",
        "docs/light.webp",
    ]


def test_anchors_are_named_as_github_names_them() -> None:
    assert slugs(LINKED) == {"the-first-one-of-two", "part", "part-1"}
