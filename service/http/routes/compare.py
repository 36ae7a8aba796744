"""Comparing jobs: their figures in one table, and the curves of their training loss."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Query, Response
from pydantic import AfterValidator, Field, StringConstraints, model_validator

from nanomoe.config import JOB_REFERENCE_PATTERN
from service.database.database import Database
from service.http import schemas, views
from service.http.openapi import problems
from service.http.patterns import AT_STEP, TAG
from service.http.routes.parameters import Service, StrictQuery
from service.http.routes.responses import as_json
from service.http.schemas.comparison import DEFAULT_METRICS, METRICS
from service.http.schemas.jobs import split_tag
from service.jobs import compared_jobs, sweeps
from service.jobs.compared_jobs import Selection
from service.jobs.comparison import Comparison, compare
from service.jobs.envelope import MAX_BUCKETS
from service.jobs.references import find_job_id, find_sweep_id
from service.jobs.tables import SERIES
from service.report import comparison as report
from service.report.words import Language

router = APIRouter(tags=["comparison"])

MAX_NAMED = 100
"""Most jobs that a request may name; a sweep or a tag stands for more."""

_FILE_HEADERS = {
    "Content-Disposition": 'attachment; filename="comparison.html"',
    # The file needs no script: what a job is named cannot become one.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
}


def _metric(given: str) -> str:
    if given not in METRICS:
        raise ValueError(f"there is no metric {given!r}; there are {', '.join(METRICS)}")
    return given


Metric = Annotated[str, AfterValidator(_metric), Field(json_schema_extra={"enum": list[Any](METRICS)})]
AReference = Annotated[str, StringConstraints(pattern=JOB_REFERENCE_PATTERN)]


class SelectionQuery(StrictQuery):
    """Which jobs are compared: exactly one of sweep, tag and job."""

    sweep: AReference | None = None
    """Compare the jobs of this sweep: by id, by name, or by a unique beginning of the id."""

    tag: Annotated[str, StringConstraints(pattern=TAG)] | None = None
    """Compare the jobs with this tag, at most 1,000: `key`, or `key=value`, for which `key:value` does as well."""

    job: list[AReference] = Field(default_factory=list, max_length=MAX_NAMED)
    """Compare this job with the others that are named, at most 100: by id, by name, or by a unique beginning of the
    id."""

    @model_validator(mode="after")
    def _one_selection(self) -> Self:
        if (self.sweep is not None) + (self.tag is not None) + bool(self.job) != 1:
            raise ValueError("name one of sweep, tag and job")
        return self

    def selection(self, db: Database) -> Selection:
        """The jobs that are meant. Raises NotFound `job_not_found`, `sweep_not_found`, Ambiguous."""
        tag = None if self.tag is None else split_tag(self.tag)
        sweep_id = None if self.sweep is None else find_sweep_id(db, self.sweep)
        return Selection(
            sweep_id=sweep_id, tag=tag, job_ids=list(dict.fromkeys(find_job_id(db, job) for job in self.job))
        )


class CompareQuery(SelectionQuery):
    """Query of `GET /compare`."""

    metric: list[Metric] = Field(default_factory=lambda: list(DEFAULT_METRICS), min_length=1, max_length=len(METRICS))
    """Metric to compare; may be given several times."""

    perplexity: float | None = Field(None, ge=1, allow_inf_nan=False)
    """Perplexity for which `steps_until` says when each job came to it."""

    best: Metric | None = None
    """Metric whose best value is named; by default the first metric."""

    at: Annotated[str, StringConstraints(pattern=AT_STEP)] | None = None
    """Step at which the step series are read, as `step:200`."""

    format: Literal["json", "csv", "html"] = "json"
    """Format of the answer; `csv` has a line for each checkpoint of each job; `html` is a file with charts and tables
    that opens offline, with its data inside."""

    lang: Language = "en"
    """Language of an answer as `html`."""

    @property
    def at_step(self) -> int | None:
        """The step in `at`."""
        return None if self.at is None else int(self.at.removeprefix("step:"))


class SeriesQuery(SelectionQuery):
    """Query of `GET /compare/series`."""

    points: int = Field(2 * MAX_BUCKETS, ge=2, le=2 * MAX_BUCKETS)
    """Most figures of a job: half of them minima, half of them maxima."""


@router.get(
    "/compare",
    summary="Compare jobs",
    response_description="The comparison, as far as the jobs have come.",
    response_model=schemas.Comparison,
    responses={
        200: {"content": {kind: {"schema": {"type": "string"}} for kind in ("text/csv", "text/html")}},
        **problems(404, 409, 422, 503),
    },
)
def compare_jobs(service: Service, query: Annotated[CompareQuery, Query()]) -> Response:
    """What differs between jobs, their figures by quarter, groups that differ only in the seed, and the best."""
    best_by = query.best or query.metric[0]
    metrics = list(dict.fromkeys([*query.metric, best_by]))
    jobs = compared_jobs.read_jobs(service.database, query.selection(service.database), metrics, query.at_step)
    found = compare(jobs, best_by=best_by, perplexity=query.perplexity)
    if query.format == "csv":
        return Response(_csv(found, metrics, query), media_type="text/csv; charset=utf-8")
    view = views.comparison(found, metrics)
    if query.format == "html":
        return _file(service, query, view)
    return as_json(view)


@router.get(
    "/compare/series",
    summary="Compare the training curves of jobs",
    response_description="The curve of each job.",
    response_model=schemas.ComparedSeries,
    responses=problems(404, 409, 422, 503),
)
def compare_series(service: Service, query: Annotated[SeriesQuery, Query()]) -> Response:
    """Minimum and maximum of the training loss of each job in buckets of steps, for a chart of all."""
    found = compared_jobs.read_envelopes(service.database, query.selection(service.database))
    for _, envelope in found:
        while 2 * len(envelope.low) > query.points:
            envelope.double()
    return as_json(views.compared_series(found))


def _file(service: Service, query: CompareQuery, view: schemas.Comparison) -> Response:
    selection = query.selection(service.database)
    series = views.compared_series(compared_jobs.read_envelopes(service.database, selection))
    title = query.tag
    if selection.sweep_id is not None:
        title = sweeps.get_sweep(service.database, selection.sweep_id)[0].name
    html = report.document(view, series, title=title, language=query.lang)
    return Response(html, headers=_FILE_HEADERS, media_type="text/html; charset=utf-8")


def _csv(found: Comparison, metrics: list[str], query: CompareQuery) -> str:
    """A line for each checkpoint of each job; a job without one has a line, too."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    until = ("steps_until", "seconds_until") if query.perplexity is not None else ()
    at = tuple(f"{name}_at_step" for name in SERIES) if query.at is not None else ()
    writer.writerow(("job_id", "name", "status", *found.parameters, "percent", "step", *metrics, *until, *at))
    for job in found.jobs:
        values = [_cell(value) for value in found.values_of(job).values()]
        reached = found.until.get(job.id)
        after = [None, None] if reached is None else [reached.step, reached.seconds]
        figures = job.at_step or dict.fromkeys(SERIES)
        quarters: Sequence[compared_jobs.Quarter | None] = job.quarters or [None]
        for quarter in quarters:
            of_quarter = _cells(quarter, metrics)
            row = (job.id, job.name, job.status, *values, *of_quarter, *after[: len(until)], *figures.values())
            writer.writerow(row[: 5 + len(values) + len(metrics) + len(until) + len(at)])
    return text.getvalue()


def _cells(quarter: compared_jobs.Quarter | None, metrics: list[str]) -> Iterator[Any]:
    yield from (None, None) if quarter is None else (quarter.percent, quarter.step)
    yield from (None if quarter is None else quarter.figures[name] for name in metrics)


def _cell(value: Any) -> Any:
    match value:
        case bool():
            return str(value).lower()
        case list() | dict():
            return re.sub(r"\s", "", str(value))
    return value
