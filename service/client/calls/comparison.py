"""Calls that put jobs side by side."""

from collections.abc import Sequence
from dataclasses import replace

from service.client.calls.call import Call, as_text, parsed
from service.client.comparison import Comparison
from service.http import schemas
from service.report.words import Language


def compare(
    *job_ids: str,
    sweep: str | None = None,
    tag: str | None = None,
    metrics: Sequence[str] | None = None,
    perplexity: float | None = None,
    best: str | None = None,
    at_step: int | None = None,
) -> Call[Comparison]:
    """Jobs side by side: these, those of a sweep, or those with a tag. `perplexity`: for which to say when each came to
    it; `best`: the metric whose best value is named; `at_step`: the step at which to read the step series."""
    params = {
        "job": list(job_ids) or None,
        "sweep": sweep,
        "tag": tag,
        "metric": None if metrics is None else list(metrics),
        "perplexity": perplexity,
        "best": best,
        "at": None if at_step is None else f"step:{at_step}",
    }
    read = parsed(schemas.Comparison)
    return Call("GET", "/compare", lambda response: Comparison(read(response)), params=params)


def compare_csv(
    *job_ids: str,
    sweep: str | None = None,
    tag: str | None = None,
    metrics: Sequence[str] | None = None,
    perplexity: float | None = None,
    best: str | None = None,
    at_step: int | None = None,
) -> Call[str]:
    """`compare` as CSV, a line for each checkpoint of each job."""
    call = compare(*job_ids, sweep=sweep, tag=tag, metrics=metrics, perplexity=perplexity, best=best, at_step=at_step)
    return Call("GET", call.path, as_text, params={**call.params, "format": "csv"})


def compare_html(
    *job_ids: str,
    sweep: str | None = None,
    tag: str | None = None,
    metrics: Sequence[str] | None = None,
    perplexity: float | None = None,
    best: str | None = None,
    at_step: int | None = None,
    lang: Language = "en",
) -> Call[str]:
    """`compare` as the text of one HTML file, which opens offline: charts and tables, and its data."""
    call = compare(*job_ids, sweep=sweep, tag=tag, metrics=metrics, perplexity=perplexity, best=best, at_step=at_step)
    return Call("GET", call.path, as_text, params={**call.params, "format": "html", "lang": lang})


def compare_series(
    *job_ids: str, sweep: str | None = None, tag: str | None = None, points: int | None = None
) -> Call[list[schemas.JobEnvelope]]:
    """The training curves of the same jobs, each as minima and maxima of buckets of steps: at most `points` figures."""
    params = {"job": list(job_ids) or None, "sweep": sweep, "tag": tag, "points": points}
    read = parsed(schemas.ComparedSeries)
    return Call("GET", "/compare/series", lambda response: read(response).jobs, params=params)


def series_of(compared: Call[Comparison]) -> Call[list[schemas.JobEnvelope]]:
    """The training curves of the jobs that a call compares."""
    selection = {name: compared.params[name] for name in ("job", "sweep", "tag")}
    return replace(compare_series(), params=selection)
