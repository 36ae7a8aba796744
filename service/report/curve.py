"""The training curves of compared jobs: those that differ only in the seed are one curve. Draws nothing."""

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass

from service.http.schemas import Comparison, JobEnvelope
from service.report.labels import label_of

Values = Sequence[float | None]


@dataclass(frozen=True)
class Curve:
    """The training loss of jobs that differ only in the seed, in buckets of equal length; None where there is none."""

    label: str
    """What differs from the other curves: `lr 0.0001, n_embd 64`."""

    n_jobs: int
    """How many jobs have begun, of which this is the mean; at its end of those that have come so far."""

    steps: Sequence[int]
    """Last step of each bucket."""

    mean: Values
    """Mean over the jobs, of the middle between their smallest and largest loss in the bucket."""

    low: Values = ()
    """Smallest loss of any of the jobs in the bucket; empty without a band."""

    high: Values = ()
    """Largest loss of any of the jobs in the bucket; empty without a band."""


def curves_of(found: Comparison, series: Iterable[JobEnvelope]) -> list[Curve]:
    """A curve for each group of the comparison, in its order; without steps where no job of a group has begun.

    `series` are the envelopes of the same jobs.
    """
    by_job = {one.job_id: one for one in series}
    whole = {job.job_id for job in found.jobs if job.status == "succeeded"}
    names = {job.job_id: job.name or job.job_id for job in found.jobs}
    return [
        curve_of(
            [by_job[job_id] for job_id in group.job_ids if job_id in by_job],
            label_of(group.values) or names[group.job_ids[0]],
            whole,
        )
        for group in found.groups
    ]


def curve_of(envelopes: Iterable[JobEnvelope], label: str, whole: Set[str] = frozenset()) -> Curve:
    """The curve of some jobs, in the longest of their buckets: at each step the mean of those that have come so far.

    It ends where the first of the jobs in `whole`, ids of those that were trained to their end, ends, so that none of
    these drops out of the mean; without one, where the job ends that has come farthest.
    """
    begun = [one for one in envelopes if one.low]
    if not begun:
        return Curve(label, 0, (), ())
    bucket_steps = max(one.bucket_steps for one in begun)
    lows = [_joined(one.low, bucket_steps // one.bucket_steps, min) for one in begun]
    highs = [_joined(one.high, bucket_steps // one.bucket_steps, max) for one in begun]
    middles = [_middles(*edges) for edges in zip(lows, highs, strict=True)]
    lengths = [(len(low), one.last_step) for low, one in zip(lows, begun, strict=True)]
    ends = [length for length, one in zip(lengths, begun, strict=True) if one.job_id in whole]
    n_buckets, last_step = min(ends) if ends else max(lengths)
    return Curve(
        label,
        len(begun),
        [min((bucket + 1) * bucket_steps, last_step) for bucket in range(n_buckets)],
        _over_jobs(middles, n_buckets, lambda known: sum(known) / len(known)),
        _over_jobs(lows, n_buckets, min),
        _over_jobs(highs, n_buckets, max),
    )


def _joined(values: Values, times: int, choose: Callable[[Sequence[float]], float]) -> list[float | None]:
    """One value for each `times` buckets, chosen of those that are there."""
    return [_of_known(values[at : at + times], choose) for at in range(0, len(values), times)]


def _middles(low: Values, high: Values) -> list[float | None]:
    return [None if a is None or b is None else (a + b) / 2 for a, b in zip(low, high, strict=True)]


def _over_jobs(
    values: Sequence[Values], n_buckets: int, choose: Callable[[Sequence[float]], float]
) -> list[float | None]:
    return [_of_known([one[bucket] for one in values if bucket < len(one)], choose) for bucket in range(n_buckets)]


def _of_known(values: Values, choose: Callable[[Sequence[float]], float]) -> float | None:
    known = [value for value in values if value is not None]
    return choose(known) if known else None


def is_logarithmic(low: float, high: float) -> bool:
    """Whether values between these are better read on a logarithmic axis: they span more than a factor of ten."""
    return low > 0 and high / low > 10
