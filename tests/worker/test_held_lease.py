"""The lease of a claim: what renews it, and what a read does when the database is out of reach."""

import time
from dataclasses import replace

import pytest

from service.errors import DatabaseUnavailable
from service.jobs.lease import Claim
from service.jobs.tables import Job
from tests.worker.workplace import QUICK
from worker.held_lease import Lease, LeaseUncertain

TIMING = replace(QUICK, retry=0.01)


@pytest.fixture
def lease() -> Lease:
    claim = Claim(Job(id="a", fence=1, text_sha256="t", config={}), 60)  # type: ignore[call-arg]
    return Lease(claim, time.monotonic(), TIMING)


def test_a_write_extends_the_lease_from_before_it_began(lease: Lease) -> None:
    began = time.monotonic() + 10
    lease.renewed(began)
    assert lease.deadline == began + TIMING.kill_after
    assert not lease.is_uncertain


def test_a_write_that_succeeds_after_the_deadline_still_fails_the_lease(lease: Lease) -> None:
    lease.fenced.set()
    with pytest.raises(LeaseUncertain):
        lease.renewed(time.monotonic())
    assert lease.is_uncertain


def test_a_read_is_tried_again_while_the_database_is_out_of_reach(lease: Lease) -> None:
    failures = iter([DatabaseUnavailable("away"), DatabaseUnavailable("away")])

    def read() -> str:
        for failure in failures:
            raise failure
        return "found"

    assert lease.read(read) == "found"


def test_a_read_fails_once_the_trainer_was_killed_at_the_deadline(lease: Lease) -> None:
    def read() -> str:
        lease.fenced.set()
        raise DatabaseUnavailable("away")

    with pytest.raises(LeaseUncertain):
        lease.read(read)
