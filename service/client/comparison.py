"""A comparison of jobs as a notebook shows it, and as rows for programs. Needs no pandas, and uses it where it is."""

from collections.abc import Iterator, Sequence
from html import escape
from importlib import import_module
from typing import Any

from service.http import schemas


class Comparison:
    """Jobs side by side: `view` is the service's answer, and `rows` the same as one flat table."""

    def __init__(self, view: schemas.Comparison) -> None:
        self.view = view

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
        """The newest checkpoint of each job as an HTML table, for a notebook."""
        rows = self.last
        names = list(dict.fromkeys(name for row in rows for name in row if name not in ("job_id", "name")))
        head = "".join(f"<th>{escape(name)}</th>" for name in ("job", *names))
        body = "".join(
            f"<tr><td>{escape(row['name'] or row['job_id'])}</td>"
            + "".join(f"<td>{escape(_shown(row.get(name)))}</td>" for name in names)
            + "</tr>"
            for row in rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
