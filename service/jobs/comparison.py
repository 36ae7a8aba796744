"""Comparing jobs: what differs, which is best, when each came to a perplexity, how much several seeds differ.

Only arithmetic on what was read.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.jobs.compared_jobs import ComparedJob, differing

LARGER_IS_BETTER = frozenset({"accuracy", "tok_per_sec", "moe.load_entropy"})
"""Metrics of which the largest is best; of all others it is the smallest."""


@dataclass(frozen=True)
class Spread:
    """A figure over several jobs."""

    n: int
    """Number of jobs that have the figure."""

    mean: float
    std: float | None
    """Sample standard deviation, with n - 1 in the denominator; None for a single job."""

    min: float
    max: float


@dataclass(frozen=True)
class Until:
    """The first checkpoint at or below a perplexity."""

    step: int
    after_step: int
    """The checkpoint before it, which was above: the perplexity was reached between the two."""

    seconds: float
    """Seconds from the first claim of the job to the recording of the checkpoint, pauses included."""


@dataclass(frozen=True)
class GroupQuarter:
    """One percent of the jobs of a group."""

    percent: int
    figures: dict[str, Spread | None]


@dataclass(frozen=True)
class Group:
    """Jobs that differ in the seed only."""

    values: dict[str, Any]
    job_ids: list[str]
    quarters: list[GroupQuarter]
    until_step: Spread | None
    until_seconds: Spread | None
    at_step: dict[str, Spread | None] | None


@dataclass(frozen=True)
class Best:
    """The best figure of all jobs and checkpoints; the first of equals."""

    metric: str
    job_id: str
    percent: int
    value: float


@dataclass(frozen=True)
class Comparison:
    """Jobs side by side."""

    parameters: dict[str, list[Any]]
    """What differs, with the distinct values."""

    jobs: Sequence[ComparedJob]
    until: dict[str, Until | None]
    """By job; empty where no perplexity was asked for."""

    groups: list[Group]
    best: Best | None

    def values_of(self, job: ComparedJob) -> dict[str, Any]:
        """The values of a job for what differs."""
        return {name: job.values[name] for name in self.parameters}


def compare(jobs: Sequence[ComparedJob], *, best_by: str, perplexity: float | None) -> Comparison:
    """Compare jobs. `best_by`: one of the metrics that were read."""
    parameters = differing(jobs)
    until = {} if perplexity is None else {job.id: find_until(job, perplexity) for job in jobs}
    groups: dict[str, list[ComparedJob]] = {}
    names = [name for name in parameters if name != "seed"]
    for job in jobs:
        groups.setdefault(repr([job.values[name] for name in names]), []).append(job)
    return Comparison(
        parameters,
        jobs,
        until,
        [_group(members, names, until) for members in groups.values()],
        find_best(jobs, best_by),
    )


def find_until(job: ComparedJob, perplexity: float) -> Until | None:
    """When a job came to a perplexity: exact to its checkpoints, and for a job with `stop_at_perplexity` to its
    `eval_interval`. None where it has not, or was never started."""
    before = 0
    for quarter in job.quarters:
        if quarter.perplexity is not None and quarter.perplexity <= perplexity and job.started_at is not None:
            return Until(quarter.step, before, (quarter.created_at - job.started_at).total_seconds())
        before = quarter.step
    return None


def find_best(jobs: Iterable[ComparedJob], metric: str) -> Best | None:
    """The best figure of all; None where there is none yet."""
    sign = -1 if metric in LARGER_IS_BETTER else 1
    found = [
        Best(metric, job.id, quarter.percent, value)
        for job in jobs
        for quarter in job.quarters
        if (value := quarter.figures[metric]) is not None
    ]
    return min(found, key=lambda best: sign * best.value, default=None)


def spread(figures: Iterable[float | None]) -> Spread | None:
    """The spread of the figures that are there; None where there is none."""
    known = [figure for figure in figures if figure is not None]
    if not known:
        return None
    mean = math.fsum(figure / len(known) for figure in known)  # the sum of perplexities may be no float
    std = math.hypot(*(figure - mean for figure in known)) / math.sqrt(len(known) - 1) if len(known) > 1 else None
    return Spread(len(known), mean, std, min(known), max(known))


def _group(jobs: Sequence[ComparedJob], names: Sequence[str], until: Mapping[str, Until | None]) -> Group:
    by_percent: dict[int, list[Mapping[str, float | None]]] = {}
    for job in jobs:
        for quarter in job.quarters:
            by_percent.setdefault(quarter.percent, []).append(quarter.figures)
    reached = [until.get(job.id) for job in jobs]
    steps = [job.at_step for job in jobs if job.at_step is not None]
    return Group(
        values={name: jobs[0].values[name] for name in names},
        job_ids=[job.id for job in jobs],
        quarters=[GroupQuarter(percent, _spreads(by_percent[percent])) for percent in sorted(by_percent)],
        until_step=_of_reached(reached, lambda found: found.step),
        until_seconds=_of_reached(reached, lambda found: found.seconds),
        at_step=_spreads(steps) if steps else None,
    )


def _of_reached(reached: Sequence[Until | None], figure: Callable[[Until], float]) -> Spread | None:
    return spread(None if found is None else figure(found) for found in reached)


def _spreads(figures: Sequence[Mapping[str, float | None]]) -> dict[str, Spread | None]:
    return {name: spread(one[name] for one in figures) for name in figures[0]}
