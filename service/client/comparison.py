"""A comparison of jobs as a notebook shows it, and as rows for programs. Needs no pandas, and uses it where it is."""

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from service.client.errors import NO_ANSWER
from service.http import schemas
from service.report import svg
from service.report.comparison import comparison
from service.report.curve import Curve, curves_of
from service.report.words import word


class Comparison:
    """Jobs side by side: `view` is the service's answer, `rows` the same as one flat table, `curves` their training
    loss."""

    def __init__(self, view: schemas.Comparison) -> None:
        self.view = view
        self.read_series: Callable[[], Sequence[schemas.JobEnvelope]] | None = None
        """Gives the training curves of the same jobs; None where an asynchronous client has not read them."""

    @property
    def parameters(self) -> dict[str, list[Any]]:
        """What differs between the jobs, with its distinct values."""
        return {one.name: one.values for one in self.view.parameters}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dictionary for each checkpoint of each job: `job_id`, `name`, `status`, what differs, `percent`, `step`
        and the metrics. A job that has recorded no checkpoint has one row, in which these are None."""
        return [row for job in self.view.jobs for row in self._rows_of(job, job.quarters or [None])]

    @property
    def last(self) -> list[dict[str, Any]]:
        """One dictionary for each job, like those of `rows`: its newest checkpoint."""
        return [row for job in self.view.jobs for row in self._rows_of(job, job.quarters[-1:] or [None])]

    @property
    def groups(self) -> list[schemas.ComparedGroup]:
        """The jobs by all that differs but the seed, with mean and spread of each metric."""
        return self.view.groups

    @property
    def best(self) -> schemas.BestFigure | None:
        """The best value of the first metric, or of the one that was asked for; None while there is none."""
        return self.view.best

    @property
    def curves(self) -> list[Curve]:
        """The training loss by step, one curve for jobs that differ only in the seed; without steps where none of them
        has begun. Asked for at each use, unless `plot` or `run` has. Raises ValueError where the client is asynchronous
        and neither has."""
        if self.read_series is None:
            raise ValueError("an asynchronous client reads the curves with plot()")
        return curves_of(self.view, self.read_series())

    @property
    def svg(self) -> str:
        """The curves as a picture, the text of an SVG file; empty while no job has a step. Raises as `curves`."""
        curves = self.curves
        has_steps = any(curve.steps for curve in curves)
        return svg.curves(curves, title="train_loss", x_name="step").file() if has_steps else ""

    def save(self, path: str | Path) -> Path:
        """Write the picture of the curves to a file. Raises ValueError while no job has a step, and as `curves`."""
        picture = self.svg
        if not picture:
            raise ValueError("no job has a step yet")
        Path(path).write_text(picture, "utf-8")
        return Path(path)

    def to_pandas(self) -> Any:
        """`rows` as a pandas DataFrame. Raises ImportError where pandas is not installed."""
        return import_module("pandas").DataFrame(self.rows)

    def _rows_of(
        self, job: schemas.ComparedJob, quarters: Sequence[schemas.ComparedQuarter | None]
    ) -> Iterator[dict[str, Any]]:
        until = job.steps_until
        reached = {} if until is None else {"steps_until": until.step, "seconds_until": until.seconds}
        at = {} if job.at_step is None else {f"{name}_at_step": value for name, value in job.at_step}
        for quarter in quarters:
            yield {
                "job_id": job.job_id,
                "name": job.name,
                "status": job.status,
                **job.values,
                "percent": None if quarter is None else quarter.percent,
                "step": None if quarter is None else quarter.step,
                **{name: None if quarter is None else quarter.metrics.get(name) for name in self.view.metrics},
                **reached,
                **at,
            }

    def __len__(self) -> int:
        return len(self.view.jobs)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __repr__(self) -> str:
        return f"<Comparison of {len(self)} jobs by {', '.join(self.parameters) or 'nothing'}>"

    def _repr_html_(self) -> str:
        """Curves, a figure over the first parameter, and tables, for a notebook. The curves are asked for now; without
        an answer they are left out, and a sentence says so."""
        if self.read_series is None:
            return comparison(self.view, None)
        try:
            return comparison(self.view, self.read_series())
        except NO_ANSWER:
            return comparison(self.view, None, note=word("no_curves", "en"))
