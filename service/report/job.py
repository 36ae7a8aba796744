"""A job and a sweep as HTML, for a notebook."""

from collections.abc import Iterator
from html import escape

from service.http.schemas import CheckpointMetrics, JobView, Metrics, SweepView
from service.report import svg
from service.report.curve import Curve
from service.report.labels import figure, value_label
from service.report.tables import table
from service.report.words import word

_FIGURES = ("loss", "perplexity", "val_loss", "accuracy", "tok_per_sec")


def job_html(view: JobView, metrics: Metrics | None) -> str:
    """A job: its status, the curve of its loss, and the figures and the continuation of each quarter; without metrics
    its status alone."""
    return "".join(_job_parts(view, metrics))


def _job_parts(view: JobView, metrics: Metrics | None) -> Iterator[str]:
    done = view.progress
    yield (
        f"<p><b>{escape(view.name or view.id)}</b> {escape(view.status)}, "
        f"{done.percent:.0f} %, {word('step', 'en')} {done.step:,}</p>"
    )
    if view.error is not None:
        yield f"<p>{escape(view.error.code)}: {escape(view.error.message)}</p>"
    if metrics is None:
        return
    steps = metrics.steps
    if steps.step:
        curve = Curve("train_loss", 1, steps.step, steps.train_loss)
        picture = svg.curves([curve], title=word("curves", "en"), x_name=word("step", "en"), width=600, height=250)
        yield picture.inline()
    if metrics.checkpoints:
        names = [name for name in _FIGURES if any(getattr(one, name) is not None for one in metrics.checkpoints)]
        head = [word("quarter", "en"), word("continues", "en"), *names]
        yield table(head, (_quarter(one, names) for one in metrics.checkpoints), n_texts=2)


def _quarter(checkpoint: CheckpointMetrics, names: list[str]) -> list[str]:
    said = checkpoint.continuation
    text = "" if said is None else f"<small>{escape(said.prompt)}</small>{escape(said.text)}"
    return [f"{checkpoint.percent} %", text, *(figure(getattr(checkpoint, name)) for name in names)]


def sweep_line(view: SweepView) -> str:
    """A sweep in one line: its name, how many of its jobs have which status, and what varies."""
    counts = ", ".join(f"{n:,} {status}" for status, n in view.counts.items() if n)
    varied = "; ".join(f"{one.name} {', '.join(map(value_label, one.values))}" for one in view.parameters)
    name = view.name or f"{word('sweep', 'en')} {view.id}"
    return f"<p><b>{escape(name)}</b> {escape(counts)}{'; ' if varied else ''}{escape(varied)}</p>"
