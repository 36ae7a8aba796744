"""A short run of the soak."""

from tests.databases import ONLY_SQLITE
from tests.faults.soak import Soak
from tests.worker.workplace import Workplace


@ONLY_SQLITE
def test_whatever_dies_every_job_ends_once_and_with_the_right_bytes(place: Workplace) -> None:
    soak = Soak(place, workers=2, seed=7)
    try:
        report = soak.run(6, 15)  # a sweep of four, and two jobs
        soak.judge()
    finally:
        soak.end()
    # Too few faults to crash a job for good; whether one is cancelled is up to how often a submission is tried.
    assert report.jobs["succeeded"] == 6 - report.jobs["cancelled"] >= 1
    assert sum(report.faults.values()) >= 3
