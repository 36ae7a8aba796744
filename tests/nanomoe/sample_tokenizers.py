"""Tokenizers to test with, and a text that is hard on them."""

import json
from pathlib import Path

import pytest

from nanomoe import tokenizer
from nanomoe.tokenizer import Tokenizer, load_tokenizer

ASSETS = Path(tokenizer.__file__).parent / "assets"
PARAGRAPH = (ASSETS / "paragraph.pt.txt").read_text(encoding="utf-8")

BUNDLED = load_tokenizer("ptbr-8k")
TOKENIZERS = [BUNDLED, load_tokenizer("bytes"), load_tokenizer("train:320", text=PARAGRAPH)]


def other_meaning(given: Tokenizer) -> Tokenizer:
    """A tokenizer of the same name and size whose ids mean something else but for the bytes, and whose texts have more
    tokens: what an earlier version of a bundled one is to the present."""
    definition = json.loads(given.definition)
    model = definition["model"]
    entries = sorted(model["vocab"], key=model["vocab"].__getitem__)
    entries[256:] = reversed(entries[256:])
    model["vocab"] = {entry: number for number, entry in enumerate(entries)}
    model["merges"] = model["merges"][: len(model["merges"]) // 4]
    return Tokenizer(given.name, json.dumps(definition))


# A family emoji, a flag, control characters, line ends, NUL, combining and bidirectional marks, the byte order mark.
AWKWARD = (
    "  Olá\r\n\tmundo \0\x07\x1b[0m\x7f\x85 e\u0301 a\u0303o \U0001f469\u200d\U0001f469\u200d\U0001f467 "
    "\U0001f1e7\U0001f1f7 \ufeff\u202e\u2028\ufffd\U0010ffff <|endoftext|> [UNK] Ġ Ċ  \n\n "
)
EACH = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: tokenizer.name)
