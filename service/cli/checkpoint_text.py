"""Checkpoints, the loss curve and the glossary as lines and tables of the terminal. Knows no connection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

from rich.console import Console
from rich.table import Table
from rich.text import Text

from service.cli import text

if TYPE_CHECKING:
    from service.http import schemas

_Column: TypeAlias = "tuple[str, int, Callable[[schemas.CheckpointMetrics], str]]"


_COLUMNS: Sequence[_Column] = (
    ("quarter", 7, lambda c: f"{c.percent} %"),
    ("step", 9, lambda c: f"{c.step:,}"),
    ("loss", 9, lambda c: text.number(c.loss, 4)),
    ("perplexity", 12, lambda c: text.figure(c.perplexity)),
    ("accuracy", 10, lambda c: text.share(c.accuracy)),
    ("bits/byte", 11, lambda c: text.number(c.bits_per_byte, 3)),
    ("tok/s", 10, lambda c: text.number(c.tok_per_sec)),
)


def quarter_header() -> Text:
    """The header of the rows of `quarter_row`."""
    return Text("".join(title.rjust(width) for title, width, _ in _COLUMNS), "bold")


def quarter_row(checkpoint: schemas.CheckpointMetrics) -> Text:
    """The figures of a checkpoint in 68 columns."""
    return Text("".join(show(checkpoint).rjust(width) for _, width, show in _COLUMNS))


def quarter_texts(checkpoint: schemas.CheckpointMetrics, console: Console, n_lines: int = 1) -> list[Text]:
    """Reconstruction, continuation and expert balance of a checkpoint, each on at most `n_lines` lines."""
    shown = []
    if checkpoint.reconstruction is not None:
        shown.append(("reconstructs", _reconstruction(checkpoint.reconstruction)))
    if checkpoint.continuation is not None:
        shown.append(("continues", _continuation(checkpoint.continuation, console, n_lines)))
    if checkpoint.moe is not None:
        shown.append(("experts", _balance(checkpoint.moe.mean)))
    return [text.labelled(label, content, console, n_lines) for label, content in shown]


def continuation_line(checkpoint: schemas.CheckpointMetrics, console: Console) -> Text:
    """The continuation of a checkpoint beside its percent, on one line."""
    given = checkpoint.continuation
    content = Text("–") if given is None else _continuation(given, console, 1)
    return text.labelled(f"{checkpoint.percent} %", content, console, 1)


def _continuation(given: schemas.Continuation, console: Console, n_lines: int) -> Text:
    prompt = _end_of(given.prompt, text.label_room(console) * n_lines - _LEFT_TO_CONTINUATION)
    return Text.assemble((text.visible(prompt), text.DIM), (PREFIX_END, text.DIM), text.visible(given.text))


PREFIX_END = "│"
"""Separator between the given prefix and the generated text."""


_LEFT_TO_CONTINUATION = 12
"""Least number of columns for the generated text after a long prefix."""


def _end_of(prefix: str, width: int) -> str:
    """The prefix, or the end of it that fits into `width`."""
    return prefix if len(prefix) <= width else f"…{prefix[1 - width :]}"


def untrained_note(console: Console) -> Text:
    """A note on why an untrained model's reconstruction resembles the text."""
    note = "untrained, it mostly repeats the token it reads: its input and output layers share their weights"
    return text.labelled("note", Text(note, text.DIM), console, 2)


def stopped_early_line(checkpoint: schemas.CheckpointMetrics) -> Text:
    """The reason for a checkpoint at 100 % before the last step."""
    from nanomoe.checkpoint import stopped_early_reason

    return Text(stopped_early_reason(checkpoint), text.DIM)


def _balance(mean: schemas.MixtureFigures) -> Text:
    """The balance of the experts, as the mean over the MoE layers."""
    return Text(
        f"load_cv {text.number(mean.load_cv, 3)}, max_violation {text.number(mean.max_violation, 3)}, "
        f"dropped {text.share(mean.dropped_fraction)}, churn {text.share(mean.churn)}"
    )


def mixture_table(checkpoints: Sequence[schemas.CheckpointMetrics]) -> Table:
    """How the experts shared the work at each quarter, as the mean over the MoE layers: one row for each figure."""
    from service.http.schemas import MixtureFigures

    mixtures = {checkpoint.percent: checkpoint.moe.mean for checkpoint in checkpoints if checkpoint.moe is not None}
    table = text.new_table("mean over MoE layers", *(f">{percent} %" for percent in mixtures))
    for name in MixtureFigures.model_fields:
        table.add_row(name, *(text.number(getattr(mean, name), 4) for mean in mixtures.values()))
    return table


def glossary_table(words: Mapping[str, str]) -> Table:
    """A table of terms and their meanings, which are wrapped at the terminal's width."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold", min_width=_GLOSSARY_WIDTH)
    table.add_column()
    for word, meaning in words.items():
        table.add_row(word, meaning)
    return table


_GLOSSARY_WIDTH = 22


def glossary_hint() -> Text:
    """A hint at the command that explains the terms."""
    return Text(f"what the words mean: {text.program()} metrics --explain", text.DIM)


def _reconstruction(reconstruction: schemas.Reconstruction) -> Text:
    if reconstruction.tokens is None:
        return Text(text.visible(reconstruction.text))
    tokens = reconstruction.tokens
    return Text.assemble(
        *((text.visible(t.predicted), text.GOOD if t.predicted == t.target else text.WRONG) for t in tokens)
    )


_BARS = "▁▂▃▄▅▆▇█"


def curve(values: Sequence[float | None]) -> str:
    """A sparkline of a series, from its lowest to its highest value."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known)
    scale = (len(_BARS) - 1) / span if span > 0 else 0.0
    return "".join(" " if value is None else _BARS[round((value - low) * scale)] for value in values)


def loss_curve(steps: schemas.StepSeries, console: Console) -> Text:
    """The training loss from the first step to the last, as wide as the console."""
    known = [loss for loss in steps.train_loss if loss is not None]
    ends = (text.number(known[0], 3), text.number(known[-1], 3)) if known else ("–", "–")
    room = max(10, min(80, console.width) - text.LABEL_WIDTH - sum(map(len, ends)) - 3)
    # One bar for each bucket of steps: its mean.
    edges = [round(i * len(steps.train_loss) / room) for i in range(room + 1)]
    buckets = [[v for v in steps.train_loss[a:b] if v is not None] for a, b in pairwise(edges) if b > a]
    means = [sum(bucket) / len(bucket) if bucket else None for bucket in buckets]
    return Text.assemble(
        ("train loss".rjust(text.LABEL_WIDTH - 1) + " ", text.DIM), ends[0], " ", (curve(means), "cyan"), " ", ends[1]
    )
