"""What is shown of jobs and checkpoints: lines and tables that fit 80 columns, in colour where there is a terminal.

Knows no connection. Texts that a model made are shown with their control characters made visible: they must not be able
to drive a terminal.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from rich.console import Console
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    # For annotations only: `nanomoe knobs` and the list of commands start without them.
    from nanomoe.config import JobConfig
    from nanomoe.evaluation.explain import LayerExplanation
    from service.http import schemas

WRONG = "red"
DIM = "dim"
GOOD = "green"
STATUS_STYLES: dict[str, str] = {
    "queued": "yellow",
    "running": "cyan",
    "paused": "yellow",
    "succeeded": GOOD,
    "failed": WRONG,
    "cancelled": "magenta",
}


def console(*, stderr: bool = False) -> Console:
    """Where everything is shown; plain lines where it is no terminal."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=not sys.stdout.isatty())


def program() -> str:
    """What to type for this command line: its path where the shell would not find it, as after `make demo`."""
    called = Path(sys.argv[0])
    if called.name != "nanomoe" or not called.exists() or shutil.which("nanomoe") is not None:
        return "nanomoe"
    return os.path.relpath(called)


@contextmanager
def waiting(what: str, *, quiet: bool = False) -> Iterator[None]:
    """Say on standard error what is being waited for, until it is there; nothing where no person looks on."""
    shown = console(stderr=True)
    if quiet or not shown.is_terminal or not sys.stdout.isatty():
        yield
        return
    with shown.status(Text(f"{what} ...", DIM)):
        yield


def print_table(table: Table, notes: Sequence[str] = ()) -> None:
    """Within the terminal's width; in a pipe as wide as it is, with nothing cut.

    `notes`: one a row, shown dimmed below the row, in a pipe at its end; an empty one is not shown.
    """
    shown = console()
    shown.width = shown.width if shown.is_terminal else 10_000
    if not any(notes):
        shown.print(table)
        return
    header, *rows = shown.render_lines(table, pad=False)
    shown.print(Segments([*header, Segment.line()]), end="")
    for row, note in zip(rows, notes, strict=True):
        shown.print(Segments(row), end="")
        if note:
            shown.print(Text(("\n  " if shown.is_terminal else "  ") + note, DIM), end="")
        shown.print()


def print_piece(console: Console, prompt: str, added: str) -> None:
    """A model's text, its prompt dimmed, without a line end; in a pipe exactly these characters."""
    if console.is_terminal:
        shown = Text.assemble((visible_lines(prompt), DIM), visible_lines(added))
        console.print(shown, end="", soft_wrap=True)
    else:
        print(prompt + added, end="", flush=True)


def visible(text: str) -> str:
    """`text` with its control characters as symbols (U+2400 and on), line ends and tabs too: it stays on one line."""
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 0x20 else "␡" if 0x7F <= ord(c) < 0xA0 else c for c in text)


def visible_lines(text: str) -> str:
    """`visible` for a text of several lines, whose line ends stay."""
    return "\n".join(visible(line) for line in text.split("\n"))


def number(value: float | None, digits: int = 0) -> str:
    """With thousands separated; a dash for what was not measured."""
    return "–" if value is None else f"{value:,.{digits}f}"


def share(value: float | None) -> str:
    """0..1 as a percentage."""
    return "–" if value is None else f"{100 * value:.1f} %"


def figure(value: float | None) -> str:
    """With about five digits, whatever its size."""
    if value is None:
        return "–"
    return f"{value:,.1f}" if 100 <= abs(value) < 1e7 else f"{value:.5g}"


def duration(seconds: float) -> str:
    """`8.2 s`, `3 min 20 s`, `2 h 05 min`, `3 d 4 h`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours == 0:
        return f"{minute} min {second:02} s"
    days, hour = divmod(hours, 24)
    return f"{hour} h {minute:02} min" if days == 0 else f"{days} d {hour} h"


def ago(moment: datetime) -> str:
    """How long since `moment`."""
    return f"{duration(max(0.0, (datetime.now(UTC) - moment).total_seconds()))} ago"


def hanging(line: Text, console: Console, indent: int = 2) -> Text:
    """The line, broken where a terminal ends and indented from there on; in a pipe as it is."""
    if not console.is_terminal:
        return line
    return Text("\n" + " " * indent).join(line.wrap(console, max(20, console.width - indent)))


# A job


def job_line(job: schemas.JobView) -> Text:
    """`0192… succeeded  my run`."""
    line = Text.assemble(job.id, "  ", status_line(job))
    if job.name:
        line.append(f"  {visible(job.name)}")
    return line


def status_text(status: str) -> Text:
    """The status in its colour."""
    return Text(status, STATUS_STYLES.get(status, ""))


def status_line(job: schemas.JobView) -> Text:
    """The status, the place in the line and the reason: `queued, 2 ahead (interrupted, ...)`."""
    line = status_text(job.status)
    if place := place_in_line(job):
        line.append(f", {place}", "default")
    if job.status_reason:
        line.append(f" ({visible(job.status_reason)})", DIM)
    return line


def place_in_line(job: schemas.JobView) -> str:
    """How many jobs go first and when this one may start, as far as the service knows: `next, may start in 20 s`.

    Empty where a worker is free for it, where the answer does not tell its place, and for a job that does not wait.
    """
    if job.status != "queued" or job.queue_position is None:
        return ""
    ahead = f"{job.queue_position:,} ahead" if job.queue_position else "next"
    if job.estimated_start_at is None:
        return ahead
    seconds = round((job.estimated_start_at - datetime.now(UTC)).total_seconds())
    if seconds < 1:
        return "" if job.queue_position == 0 else ahead
    return f"{ahead}, may start in about {f'{seconds} s' if seconds < 60 else duration(seconds)}"


def size_line(config: JobConfig, model: schemas.ModelSize, n_tokens: int | None, steps: int | None) -> Text:
    """What the job is: `4 layers of 128 channels, 1.8 M parameters; 76 tokens, 500 steps`."""
    kind = f"{config.n_experts} experts, {config.k} per token, " if config.use_moe else ""
    parts = [f"{config.n_layer} layers of {config.n_embd} channels, {kind}{millions(model.n_params)} parameters"]
    if model.n_active_params is not None and model.n_active_params != model.n_params:
        parts[0] += f" ({millions(model.n_active_params)} active)"
    if n_tokens is not None:
        parts.append(f"{n_tokens:,} tokens" + (f", {steps:,} steps" if steps is not None else ""))
    return Text("; ".join(parts), DIM)


def ending(job: schemas.JobView) -> Text:
    """How it ended."""
    took = ""
    if job.started_at is not None and job.finished_at is not None:
        took = f" in {duration((job.finished_at - job.started_at).total_seconds())}"
    line = status_text(job.status).append(took, "default")
    if job.status_reason:
        line.append(f", {visible(job.status_reason)}", "default")
    if job.error is not None:
        line.append(f": {job.error.code}: {visible(job.error.message)}", "default")
    return line


def millions(n: int | None) -> str:
    """`1.81 M`, `12.3 k`; `?` where it is not known yet."""
    if n is None:
        return "?"
    return f"{n / 1e6:,.2f} M" if n >= 1e6 else f"{n / 1e3:.1f} k" if n >= 1e3 else str(n)


def warning_line(code: str, message: str, console: Console) -> Text:
    """`warning prefix_longer_than_text: ...`, on as many lines as the terminal needs; in a pipe on one."""
    return hanging(Text.assemble(("warning ", "yellow"), f"{code}: {visible(message)}"), console)


def print_jobs(jobs: Sequence[schemas.JobView]) -> None:
    """One row a job, and what is to be said of it: its place in the line, why it waits or why it ended early."""
    notes = [", ".join(filter(None, [place_in_line(job), visible(job.status_reason or "")])) for job in jobs]
    print_table(jobs_table(jobs), notes)


def jobs_table(jobs: Iterable[schemas.JobView]) -> Table:
    """One row a job."""
    table = new_table("job", "status", ">done", ">submitted", "name")
    for job in jobs:
        table.add_row(
            job.id,
            status_text(job.status),
            f"{job.progress.percent:.0f} %",
            ago(job.created_at),
            visible(job.name or ""),
        )
    return table


def workers_table(workers: Iterable[schemas.WorkerView]) -> Table:
    """One row a worker."""
    table = new_table("worker", "host", "device", ">jobs", ">slots", ">last seen")
    for worker in workers:
        devices = ", ".join(" ".join(filter(None, (one.device, one.name))) for one in worker.devices)
        table.add_row(
            visible(worker.name),
            visible(worker.host),
            visible(devices),
            str(len(worker.current_jobs)),
            str(worker.slots),
            "stopped" if worker.stopped_at is not None else ago(worker.last_seen_at),
        )
    return table


def new_table(*columns: str) -> Table:
    """Without lines; a column that begins with `>` is set flush right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        table.add_column(column.removeprefix(">"), justify=justify, no_wrap=True)
    return table


# What a prompt makes a model do


def next_tokens_table(last: str, tokens: Iterable[schemas.NextTokenView]) -> Table:
    """The likeliest tokens to follow `last`, the last one that was read."""
    table = new_table(f"after {last!r}", ">id", ">probability")
    for token in tokens:
        table.add_row(repr(token.text), str(token.token), number(token.probability, 4))
    return table


_N_SHOWN = 3
"""Tokens that a head attends to most."""

_N_ROUTED = 12
"""Tokens whose experts are shown."""


def attention_table(answer: schemas.InspectResponse) -> Table:
    """What the last token attends to most, in each head."""
    last = len(answer.tokens) - 1
    table = new_table("layer", ">head", f"{answer.tokens[last].text!r} attends to")
    for layer, heads in enumerate(answer.attention):
        for head, rows in enumerate(heads):
            most = sorted(range(last + 1), key=lambda t: -rows[last][t])[:_N_SHOWN]
            seen = ", ".join(f"{answer.tokens[t].text!r} {number(rows[last][t], 2)}" for t in most)
            table.add_row("" if head else str(layer), str(head), seen)
    return table


def router_table(answer: schemas.InspectResponse) -> Table:
    """The experts that the last tokens read were sent to, in gate order: one row a token, one column a layer."""
    table = new_table("read and sent to experts", *(f"layer {layer.layer}" for layer in answer.routing))
    for t in range(len(answer.tokens))[-_N_ROUTED:]:
        experts = (", ".join(map(str, layer.chosen[t])) for layer in answer.routing)
        table.add_row(repr(answer.tokens[t].text), *experts)
    return table


# A token's routing


def routing_table(layer: LayerExplanation) -> Table:
    """What one layer's router says of each expert, and below it the sums."""
    biased = any(score.balance_bias != 0 for score in layer.experts)
    columns = [f"layer {layer.layer}", ">expert", ">logit", ">probability", ">choice", ">gate"]
    table = new_table(*columns, *([">balance bias"] if biased else []))
    for score in layer.experts:
        is_chosen = score.gate is not None
        cells = [
            "",
            str(score.expert),
            number(score.logit, 4),
            number(score.probability, 4),
            str(layer.chosen.index(score.expert) + 1) if is_chosen else "–",
            number(score.gate, 4),
        ]
        table.add_row(*cells, *([number(score.balance_bias, 4)] if biased else []), style=GOOD if is_chosen else None)
    table.add_row("", "sum", "", number(sum(s.probability for s in layer.experts), 4), "", number(layer.gate_sum, 4))
    return table


def gates_line(layer: LayerExplanation, config: JobConfig) -> Text:
    """Where the gates come from, with the numbers: `gates: 0.2561 / 0.4563 = 0.5612, ...`."""
    chosen = [layer.experts[expert] for expert in layer.chosen]
    total = sum(score.probability for score in chosen)
    if config.renormalises_gates:
        terms = [f"{score.probability:.4f} / {total:.4f} = {score.gate:.4f}" for score in chosen]
        origin = "each probability over the sum of the chosen ones"
    else:
        terms = [f"{score.gate:.4f}" for score in chosen]
        origin = "the probabilities as they are" if config.router_score == "softmax" else "the sigmoid of each logit"
    shared = f"; {layer.shared_experts} shared beside them" if layer.shared_experts else ""
    return Text(f"gates: {', '.join(terms)} ({origin}){shared}", DIM)


# Quarters

_Column: TypeAlias = "tuple[str, int, Callable[[schemas.CheckpointMetrics], str]]"

_COLUMNS: Sequence[_Column] = (
    ("quarter", 7, lambda c: f"{c.percent} %"),
    ("step", 9, lambda c: f"{c.step:,}"),
    ("loss", 9, lambda c: number(c.loss, 4)),
    ("perplexity", 12, lambda c: figure(c.perplexity)),
    ("accuracy", 10, lambda c: share(c.accuracy)),
    ("bits/byte", 11, lambda c: number(c.bits_per_byte, 3)),
    ("tok/s", 10, lambda c: number(c.tok_per_sec)),
)


def quarter_header() -> Text:
    """The line above the rows of `quarter_row`."""
    return Text("".join(title.rjust(width) for title, width, _ in _COLUMNS), "bold")


def quarter_row(checkpoint: schemas.CheckpointMetrics) -> Text:
    """A checkpoint's figures: 68 columns."""
    return Text("".join(show(checkpoint).rjust(width) for _, width, show in _COLUMNS))


def quarter_texts(checkpoint: schemas.CheckpointMetrics, console: Console, n_lines: int = 1) -> list[Text]:
    """What it reconstructs and continues, and its experts' balance, each on at most `n_lines` lines."""
    shown = []
    if checkpoint.reconstruction is not None:
        shown.append(("reconstructs", _reconstruction(checkpoint.reconstruction)))
    if checkpoint.continuation is not None:
        prompt = _end_of(checkpoint.continuation.prompt, _room(console) * n_lines - _LEFT_TO_CONTINUATION)
        text = visible(checkpoint.continuation.text)
        shown.append(("continues", Text.assemble((visible(prompt), DIM), (PREFIX_END, DIM), text)))
    if checkpoint.moe is not None:
        shown.append(("experts", _balance(checkpoint.moe.mean)))
    return [labelled(label, text, console, n_lines) for label, text in shown]


PREFIX_END = "│"
"""Stands between the prefix that was given and what the model added."""

_LEFT_TO_CONTINUATION = 12
"""Columns that a long prefix leaves at least."""


def _end_of(prefix: str, width: int) -> str:
    """The prefix, or as much of its end as there is room for."""
    return prefix if len(prefix) <= width else f"…{prefix[1 - width :]}"


def untrained_note(console: Console) -> Text:
    """Why the reconstruction of a model that has not been trained looks as if it knew the text."""
    note = "untrained, it mostly repeats the token it reads: its input and output layers share their weights"
    return labelled("note", Text(note, DIM), console, 2)


def stopped_early_line(checkpoint: schemas.CheckpointMetrics) -> Text:
    """Why this checkpoint at 100 % is not that of the last step."""
    from nanomoe.checkpoint import stopped_early

    return Text(stopped_early(checkpoint.step, checkpoint.perplexity), DIM)


def _balance(mean: schemas.MixtureFigures) -> Text:
    """How evenly tokens are routed, as the mean over the MoE layers."""
    return Text(
        f"load_cv {number(mean.load_cv, 3)}, max_violation {number(mean.max_violation, 3)}, "
        f"dropped {share(mean.dropped_fraction)}, churn {share(mean.churn)}"
    )


def mixture_table(checkpoints: Sequence[schemas.CheckpointMetrics]) -> Table:
    """How the experts shared the work at each quarter, as the mean over the MoE layers: one row a figure."""
    from service.http.schemas import MixtureFigures

    mixtures = {checkpoint.percent: checkpoint.moe.mean for checkpoint in checkpoints if checkpoint.moe is not None}
    table = new_table("mean over MoE layers", *(f">{percent} %" for percent in mixtures))
    for name in MixtureFigures.model_fields:
        table.add_row(name, *(number(getattr(mean, name), 4) for mean in mixtures.values()))
    return table


# Words


def glossary_table(words: Mapping[str, str]) -> Table:
    """One row a word; a meaning is broken where the terminal ends."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold", min_width=_GLOSSARY_WIDTH)
    table.add_column()
    for word, meaning in words.items():
        table.add_row(word, meaning)
    return table


_GLOSSARY_WIDTH = 22


def glossary_hint() -> Text:
    """Where the words of a table are explained."""
    return Text(f"what the words mean: {program()} metrics --explain", DIM)


def _reconstruction(reconstruction: schemas.Reconstruction) -> Text:
    if reconstruction.tokens is None:
        return Text(visible(reconstruction.text))
    tokens = reconstruction.tokens
    return Text.assemble(*((visible(t.predicted), GOOD if t.predicted == t.target else WRONG) for t in tokens))


_LABEL_WIDTH = 15


def _room(console: Console) -> int:
    """Columns beside a label."""
    return max(20, console.width - _LABEL_WIDTH - 1)


def labelled(label: str, text: Text, console: Console, n_lines: int) -> Text:
    """The label in a column of its own, the text beside it, cut after `n_lines` lines."""
    room = _room(console)
    wrapped = text.wrap(console, room, tab_size=1)
    lines = list(wrapped)[:n_lines]
    if len(wrapped) > n_lines:
        lines[-1].truncate(room - 1)
        lines[-1].append("…")
    return Text.assemble((f"{label.rjust(_LABEL_WIDTH - 1)} ", DIM), Text("\n" + " " * _LABEL_WIDTH).join(lines))


_BARS = "▁▂▃▄▅▆▇█"


def curve(values: Sequence[float | None]) -> str:
    """A line of bars, the lowest value low: the shape of a series."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known)
    scale = (len(_BARS) - 1) / span if span > 0 else 0.0
    return "".join(" " if value is None else _BARS[round((value - low) * scale)] for value in values)


def loss_curve(steps: schemas.StepSeries, console: Console) -> Text:
    """The training loss from the first step to the last, as wide as the console."""
    known = [loss for loss in steps.train_loss if loss is not None]
    ends = (number(known[0], 3), number(known[-1], 3)) if known else ("–", "–")
    room = max(10, min(80, console.width) - _LABEL_WIDTH - sum(map(len, ends)) - 3)
    # One bar a bucket of steps: its mean, as the eye would take it from a plot.
    edges = [round(i * len(steps.train_loss) / room) for i in range(room + 1)]
    buckets = [[v for v in steps.train_loss[a:b] if v is not None] for a, b in pairwise(edges) if b > a]
    means = [sum(bucket) / len(bucket) if bucket else None for bucket in buckets]
    return Text.assemble(
        ("train loss".rjust(_LABEL_WIDTH - 1) + " ", DIM), ends[0], " ", (curve(means), "cyan"), " ", ends[1]
    )
