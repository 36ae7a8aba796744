"""Curves of compared jobs: seeds are one, buckets of other lengths are made equal."""

from collections.abc import Collection
from typing import Any

from service.http.schemas import Comparison, JobEnvelope
from service.report.curve import Curve, curve_of, curves_of
from service.report.labels import label_of


def compared(groups: list[tuple[dict[str, Any], list[str]]], running: Collection[str] = ()) -> Comparison:
    def status(job_id: str) -> str:
        return "running" if job_id in running else "succeeded"

    jobs = [
        {"job_id": job_id, "name": f"n {job_id}", "status": status(job_id), "values": values, "quarters": []}
        for values, job_ids in groups
        for job_id in job_ids
    ]
    made = [{"values": values, "job_ids": job_ids, "quarters": []} for values, job_ids in groups]
    return Comparison.model_validate(
        {"parameters": [], "metrics": ["loss"], "jobs": jobs, "groups": made, "best": None}
    )


def envelope(job_id: str, bucket_steps: int, last_step: int, low: list[Any], high: list[Any]) -> JobEnvelope:
    return JobEnvelope(job_id=job_id, bucket_steps=bucket_steps, last_step=last_step, low=low, high=high)


def test_one_job_is_the_middle_of_its_buckets_within_their_extremes() -> None:
    curve = curve_of([envelope("a", 2, 5, [1, None, 3], [3, None, 5])], "a")
    assert curve == Curve("a", 1, [2, 4, 5], [2, None, 4], [1, None, 3], [3, None, 5])


def test_seeds_are_one_curve_in_the_longest_buckets_as_long_as_the_shortest_that_has_ended() -> None:
    found = compared([({"lr": 1e-4}, ["a", "b", "queued"]), ({"lr": 5e-3}, ["c"])])
    series = [
        envelope("a", 2, 9, [1.0, 2.0, 3.0, 4.0, 4.0], [2.0, 4.0, 3.0, 5.0, 4.0]),
        envelope("b", 4, 7, [5.0, None], [7.0, None]),
        envelope("c", 1, 2, [9.0, 8.0], [9.0, 8.0]),
        envelope("queued", 1, 0, [], []),
    ]
    # Of the first job, steps 1 to 4 together reach from 1 to 4.
    assert curves_of(found, series) == [
        Curve("lr 0.0001", 2, [4, 7], [(2.5 + 6.0) / 2, 4.0], [1.0, 3.0], [7.0, 5.0]),
        Curve("lr 0.005", 1, [1, 2], [9.0, 8.0], [9.0, 8.0], [9.0, 8.0]),
    ]


def test_a_seed_that_still_runs_cuts_nothing_off_and_counts_as_far_as_it_has_come() -> None:
    series = [envelope("a", 1, 3, [8, 6, 4], [8, 6, 4]), envelope("b", 1, 1, [10], [10])]
    groups = [({"lr": 1e-4}, ["a", "b"])]
    for running, steps in ((["b"], [1, 2, 3]), (["a", "b"], [1, 2, 3]), ([], [1])):
        (curve,) = curves_of(compared(groups, running), series)
        assert curve == Curve(
            "lr 0.0001", 2, steps, [9, 6, 4][: len(steps)], [8, 6, 4][: len(steps)], [10, 6, 4][: len(steps)]
        )


def test_jobs_that_do_not_differ_are_named_and_one_without_steps_keeps_its_place() -> None:
    found = compared([({}, ["a"]), ({}, ["b"]), ({}, ["gone"])])
    series = [envelope("a", 1, 0, [], []), envelope("b", 1, 1, [1.0], [1.0])]
    assert [(curve.label, curve.n_jobs, curve.mean) for curve in curves_of(found, series)] == [
        ("n a", 0, ()),
        ("n b", 1, [1.0]),
        ("n gone", 0, ()),
    ]


def test_values_are_labelled_as_they_are_set() -> None:
    values = {"lr": 1e-4, "bias": True, "grad_clip": None, "text": "ab" * 32, "betas": [0.9, 0.95]}
    assert label_of(values) == "lr 0.0001, bias true, grad_clip null, text abababab, betas [0.9, 0.95]"
