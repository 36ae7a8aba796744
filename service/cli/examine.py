"""Commands that look into a checkpoint: how well it knows a text, and what a prompt makes it do."""

import codecs
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import typer
from rich.text import Text

from service import schemas
from service.cli import text
from service.cli.jobs import read_text
from service.cli.options import Url, connect
from service.cli.output import Json, print_json
from service.cli.references import Reference

Target = Annotated[str, typer.Argument(metavar="JOB[@CHECKPOINT]", help="A job, or latest; then perhaps @50.")]

_SURPRISES = ((1.0, text.GOOD), (3.0, "yellow"))
"""Up to so many nats a token is shown in this colour: expected, and in between; beyond, it came as a surprise."""


def score(
    target: Target,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A UTF-8 text, or - for standard input.")],
    url: Url = None,
    as_json: Json = False,
) -> None:
    """How well a checkpoint knows any text: memorised or learned?"""
    reference = Reference.parse(target)
    given = read_text(file)
    with connect(url) as client:
        answer = reference.find(client).score(given, reference.checkpoint or "latest")
    if as_json:
        print_json(answer)
        return
    console = text.console()
    console.print(_coloured(given.encode(), answer.tokens))
    console.print(
        f"{answer.n_tokens:,} tokens, loss {text.number(answer.loss, 4)}, total {text.number(answer.total_loss, 2)}, "
        f"perplexity {text.figure(answer.perplexity)}, {text.number(answer.bits_per_byte, 3)} bits/byte"
    )
    if answer.copied is None:
        console.print("nothing of it stands in the training text")
    else:
        copied = answer.copied
        where = f"from byte {copied.start:,}, there from {copied.training_start:,}"
        console.print(f"longest span copied from the training text: {copied.n_bytes:,} bytes, {where}")
        console.print(text.labelled("copied", Text(text.visible(copied.text)), console, 3))


def inspect(
    target: Target,
    prompt: Annotated[str, typer.Argument(help="The text to read.")],
    url: Url = None,
    as_json: Json = False,
) -> None:
    """What a prompt makes a checkpoint do: next tokens, attention, routing. --json has every number."""
    reference = Reference.parse(target)
    with connect(url) as client:
        answer = reference.find(client).inspect(prompt, reference.checkpoint or "latest")
    if as_json:
        print_json(answer)
        return
    text.print_table(text.next_tokens_table(answer.likeliest))
    text.print_table(text.attention_table(answer))
    if answer.routing:
        text.print_table(text.router_table(answer))


def _coloured(given: bytes, tokens: Sequence[schemas.ScoredToken]) -> Text:
    """The text, each token in its colour; a character that tokens split has the colour of its last part."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    shown = Text()
    for token, following in pairwise([*tokens, None]):
        assert token is not None
        part = given[token.byte_offset : None if following is None else following.byte_offset]
        shown.append(text.visible_lines(decoder.decode(part)), _colour(token.loss))
    return shown


def _colour(loss: float | None) -> str:
    """How a token is shown that was predicted so."""
    if loss is None:
        return text.DIM
    return next((colour for most, colour in _SURPRISES if loss <= most), text.WRONG)
