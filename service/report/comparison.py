"""A comparison as HTML: curves over each other, a figure over a parameter, tables of what differs.

`comparison` is a part for a notebook, `document` a whole file that opens offline, with its data inside.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from service.http.schemas import ComparedGroup, ComparedJob, ComparedSeries, Comparison, JobEnvelope, Spread
from service.report import svg
from service.report.curve import curves_of
from service.report.labels import figure, label_of, value_label
from service.report.tables import spread, swatch, table
from service.report.words import Language, word

MOST_ROWS = 200
"""Most rows of a table; a file's data has all."""

_STYLE = """
:root { color-scheme: light dark; }
body { max-width: 1100px; margin: 24px auto; padding: 0 16px; font: 14px/1.45 system-ui, sans-serif; }
h1 { font-size: 20px; overflow-wrap: anywhere; } h4 { margin: 24px 0 6px; font-size: 14px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 10px; white-space: nowrap; }
tr { border-bottom: 1px solid color-mix(in srgb, currentcolor 15%, transparent); }
th { font-weight: 500; opacity: .75; } .charts { display: flex; flex-wrap: wrap; gap: 16px; }
.charts > div { flex: 1 1 420px; min-width: 0; } .tables { overflow-x: auto; } p { max-width: 80ch; }
"""


@dataclass(frozen=True)
class _Row:
    """A job, or a group of jobs that differ in the seed only."""

    label: str
    values: dict[str, Any]
    jobs: Sequence[ComparedJob]
    group: ComparedGroup | None

    def newest(self, metric: str) -> str:
        if self.group is not None:
            quarters = self.group.quarters
            return spread(quarters[-1].metrics[metric]) if quarters else "–"
        (job,) = self.jobs
        return figure(job.quarters[-1].metrics[metric] if job.quarters else None)

    def at(self, percent: int, metric: str) -> str:
        if self.group is not None:
            return next((spread(one.metrics[metric]) for one in self.group.quarters if one.percent == percent), "–")
        (job,) = self.jobs
        return next((figure(one.metrics[metric]) for one in job.quarters if one.percent == percent), "–")

    def best(self, metric: str, *, largest: bool) -> str:
        known = [found for job in self.jobs for one in job.quarters if (found := one.metrics[metric]) is not None]
        return figure((max if largest else min)(known, default=None))


def comparison(
    found: Comparison, series: Sequence[JobEnvelope] | None, *, language: Language = "en", note: str = ""
) -> str:
    """A comparison as a part of a page. Without `series` there are no curves; `note` is said in their place."""
    return "".join(_parts(found, series, language, note))


def document(found: Comparison, series: ComparedSeries, *, title: str | None = None, language: Language = "en") -> str:
    """A comparison as a file of its own. It needs no script and no network; its last element holds both answers of the
    service that it was made of."""
    title = title or word("comparison", language)
    # Inside a script element nothing is escaped, and `</script>` or `<!--` would end it or change its meaning.
    data = f'{{"comparison":{found.model_dump_json()},"series":{series.model_dump_json()}}}'.replace("<", "\\u003c")
    return (
        f'<!doctype html>\n<html lang="{"pt-BR" if language == "pt" else "en"}"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)} · nanomoe</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f"{comparison(found, series.jobs, language=language)}<p><small>{escape(word('data', language))}</small></p>"
        f'<script type="application/json" id="data">{data}</script></body></html>\n'
    )


def _parts(found: Comparison, series: Sequence[JobEnvelope] | None, language: Language, note: str) -> Iterator[str]:
    names = [one.name for one in found.parameters]
    rows = _rows(found)
    is_grouped = rows != [] and rows[0].group is not None
    n = len(found.jobs)
    size = word("one_job", language) if n == 1 else word("jobs", language, n=f"{n:,}")
    differs = f"; {word('differs', language, names=', '.join(names))}" if names else ""
    yield f"<p>{escape(size + differs)}</p>"
    if not rows:
        return
    yield '<div class="charts">'
    if series is None:
        yield f"<p>{escape(note)}</p>" if note else ""
    else:
        yield _curves(found, series, language)
    yield _by_parameter(found, rows, language)
    yield '</div><div class="tables">'
    if len(rows) > 1 or not any(job.quarters for job in found.jobs):
        yield _newest(found, rows, is_grouped, language)
    yield _quarters(found, rows, is_grouped, language)
    yield "</div>"


def _rows(found: Comparison) -> list[_Row]:
    """The groups, or their jobs where each has one: in the order of the curves, whose colours they have."""
    by_id = {job.job_id: job for job in found.jobs}
    if any(len(group.job_ids) > 1 for group in found.groups):
        return [
            _Row(_label(group.values, by_id[group.job_ids[0]]), group.values, [by_id[i] for i in group.job_ids], group)
            for group in found.groups
        ]
    jobs = [by_id[job_id] for group in found.groups for job_id in group.job_ids]
    return [_Row(_label(job.values, job), job.values, [job], None) for job in jobs]


def _label(values: dict[str, Any], job: ComparedJob) -> str:
    return label_of(values) or job.name or job.job_id


def _curves(found: Comparison, series: Sequence[JobEnvelope], language: Language) -> str:
    title = word("curves", language)
    drawn = curves_of(found, series)
    picture = svg.curves(drawn, title=title, x_name=word("step", language), width=600, height=304)
    is_mean = any(curve.n_jobs > 1 for curve in drawn)
    note = word("band_of_seeds" if is_mean else "band_of_steps", language) if len(drawn) <= svg.MANY else ""
    return (
        f"<div><h4>{escape(title)}</h4>{picture.inline()}<p>{_legend([curve.label for curve in drawn])}"
        f"<br><small>{escape(note)}</small></p></div>"
    )


def _by_parameter(found: Comparison, rows: Sequence[_Row], language: Language) -> str:
    """The newest figure over the first parameter, with a line for each value of the second."""
    names = [one for one in found.parameters if one.name != "seed"]
    if not names or len(names[0].values) > MOST_ROWS:
        return ""
    metric = found.metrics[0]
    first = _in_order(names[0].values)
    second = _in_order(names[1].values)[: len(svg.COLOURS)] if len(names) > 1 else [None]
    points: list[list[list[float]]] = [[[] for _ in first] for _ in second]
    for row in rows:
        line = second.index(row.values[names[1].name]) if len(names) > 1 and row.values[names[1].name] in second else 0
        for job in row.jobs:
            newest = job.quarters[-1].metrics[metric] if job.quarters else None
            if newest is not None:
                points[line][first.index(row.values[names[0].name])].append(newest)
    labels = [label_of({names[1].name: one}) if len(names) > 1 else "" for one in second]
    drawn = [svg.Series(label, line) for label, line in zip(labels, points, strict=True)]
    title = word("over", language, metric=metric, name=names[0].name)
    picture = svg.by_parameter([value_label(one) for one in first], drawn, title=title, x_name=names[0].name)
    legend = _legend(labels) if len(names) > 1 else ""
    return f"<div><h4>{escape(title)}</h4>{picture.inline()}<p>{legend}</p></div>"


def _legend(labels: Sequence[str]) -> str:
    """Names beside the colours of their lines, none of them broken over two rows; nothing where they are too many."""
    if len(labels) > svg.MOST_NAMES:
        return ""
    return " ".join(
        f'<span style="white-space:nowrap;margin-inline-end:12px">{swatch(index)}{escape(label)}</span>'
        for index, label in enumerate(labels)
    )


def _in_order(values: Sequence[Any]) -> list[Any]:
    """Numbers by their size, everything else as it came."""
    if all(isinstance(one, int | float) and not isinstance(one, bool) for one in values):
        return sorted(values)
    return list(values)


def _newest(found: Comparison, rows: Sequence[_Row], is_grouped: bool, language: Language) -> str:
    names = [one.name for one in found.parameters if not is_grouped or one.name != "seed"]
    metric = found.metrics[0]
    largest = metric in found.larger_is_better
    metrics = _measured(found)
    extra = list(_extra(rows, language))
    head = [
        *(names or [word("job", language)]),
        word("seeds" if is_grouped else "status", language),
        *metrics,
        word("best", language, metric=metric),
        *(name for name, _ in extra),
    ]
    body = (
        [
            *_named(row, names, index),
            str(len(row.jobs)) if is_grouped else escape(row.jobs[0].status),
            *(row.newest(one) for one in metrics),
            row.best(metric, largest=largest),
            *(cells[index] for _, cells in extra),
        ]
        for index, row in enumerate(rows[:MOST_ROWS])
    )
    hidden = len(rows) - MOST_ROWS
    notes = [word("spread", language)] if is_grouped else []
    notes += [word("more", language, n=f"{hidden:,}")] if hidden > 0 else []
    note = f"<p><small>{escape(' '.join(notes))}</small></p>" if notes else ""
    return f"<h4>{escape(word('newest', language))}</h4>{table(head, body, n_texts=max(len(names), 1) + 1)}{note}"


def _measured(found: Comparison) -> list[str]:
    """The metrics that some job has; the first one always."""
    known = {
        name for job in found.jobs for one in job.quarters for name, value in one.metrics.items() if value is not None
    }
    return [name for index, name in enumerate(found.metrics) if index == 0 or name in known]


def _named(row: _Row, names: Sequence[str], index: int) -> list[str]:
    """What sets a row apart, its colour first."""
    cells = [escape(value_label(row.values[name])) for name in names] or [escape(row.label)]
    return [swatch(index) + cells[0], *cells[1:]]


def _extra(rows: Sequence[_Row], language: Language) -> Iterator[tuple[str, list[str]]]:
    """Columns that only some comparisons have: when a perplexity was reached, the loss at a step."""
    if any(job.steps_until for row in rows for job in row.jobs):
        for name, read in (("until", "step"), ("seconds_until", "seconds")):
            yield (
                word(name, language),
                [_over(row, [getattr(job.steps_until, read, None) for job in row.jobs]) for row in rows],
            )
    if any(job.at_step for row in rows for job in row.jobs):
        yield (
            word("at_step", language),
            [_over(row, [getattr(job.at_step, "train_loss", None) for job in row.jobs]) for row in rows],
        )


def _over(row: _Row, figures: Sequence[float | None]) -> str:
    known = [one for one in figures if one is not None]
    if len(known) < 2:
        return figure(known[0] if known else None)
    mean = sum(known) / len(known)
    std = (sum((one - mean) ** 2 for one in known) / (len(known) - 1)) ** 0.5
    return spread(Spread(n=len(known), mean=mean, std=std, min=min(known), max=max(known)))


def _quarters(found: Comparison, rows: Sequence[_Row], is_grouped: bool, language: Language) -> str:
    """The first metric of each row by quarter; of a single row, every metric."""
    percents = sorted({one.percent for job in found.jobs for one in job.quarters})
    if not percents:
        return ""
    columns = [f"{percent} %" for percent in percents]
    if len(rows) == 1:
        (row,) = rows
        body = [[escape(metric), *(row.at(percent, metric) for percent in percents)] for metric in _measured(found)]
        heading = f"<h4>{swatch(0)}{escape(row.label)}, {escape(row.jobs[0].status)}</h4>"
        return heading + table([word("quarter", language), *columns], body, n_texts=1)
    names = [one.name for one in found.parameters if not is_grouped or one.name != "seed"]
    metric = found.metrics[0]
    lines = (
        [*_named(row, names, index), *(row.at(percent, metric) for percent in percents)]
        for index, row in enumerate(rows[:MOST_ROWS])
    )
    head = [*(names or [word("job", language)]), *columns]
    title = word("quarters", language, metric=metric)
    return f"<h4>{escape(title)}</h4>{table(head, lines, n_texts=max(len(names), 1))}"
