"""The database is away, for less and for more than a lease: who goes on, who ends, and with which bytes.

Two real ways to be away, on a real server: every connection cut, or everything standing still; and on SQLite the write
lock in another process's hand.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from service.jobs import reads
from service.jobs.tables import Job
from tests.databases import PostgresqlServer
from tests.faults.undisturbed import DENSE, TEXT, assert_undisturbed, hooked, undisturbed
from tests.worker.workplace import QUICK, SHORT_LEASE, Workplace, ended_within

Outage = Callable[[Workplace, pytest.FixtureRequest], AbstractContextManager[None]]


def _server(request: pytest.FixtureRequest) -> PostgresqlServer:
    server: PostgresqlServer = request.getfixturevalue("postgresql_server")
    return server


LOCKED = pytest.param("sqlite", lambda place, _: place.write_lock_held(), id="locked")
STOPPED = pytest.param("postgresql", lambda _, request: _server(request).stopped(), id="stopped")
FROZEN = pytest.param("postgresql", lambda _, request: _server(request).frozen(), id="frozen")


def _n_refused(log: Path, job: Job) -> int:
    """How often a worker was told that its write to the job could not be done."""
    return sum("database_out_of_reach" in line and job.id in line for line in log.read_text().splitlines())


@pytest.mark.parametrize(("database_url", "outage"), [LOCKED, STOPPED, FROZEN], indirect=["database_url"])
def test_a_database_that_is_away_for_less_than_the_lease_costs_nothing(
    place: Workplace, request: pytest.FixtureRequest, outage: Outage
) -> None:
    log = place.settings.data_dir / "worker.log"
    timing = replace(QUICK, lease=12.0, heartbeat=0.5)
    place.start_worker(program=hooked({1: {"wait": "f1-50/renamed"}}), timing=timing, busy_seconds=0.2, log=log)
    job = place.submit(TEXT, **DENSE)
    place.wait_until(lambda: 25 in [row.percent for row in reads.list_checkpoints(place.db, job.id)])
    with outage(place, request):
        (place.folder(job) / "go").touch()  # all the rest is trained and told meanwhile
        if request.node.callspec.id == "frozen":
            time.sleep(1.5)  # no write is refused, but none comes to its end: the fault itself
        else:
            place.wait_until(lambda: _n_refused(log, job) >= 3)
    done = place.wait_for(job, "succeeded", "failed")
    assert (done.status, done.attempt, done.fence, done.crashes) == ("succeeded", 1, 1, 0)
    assert place.statuses(job) == ["queued", "running", "succeeded"]
    assert_undisturbed(place, job, undisturbed("dense"))


# That a lock held for longer does the same on SQLite is seen in test_processes.py.
@pytest.mark.parametrize(("database_url", "outage"), [STOPPED, FROZEN], indirect=["database_url"])
def test_a_database_that_is_away_for_longer_than_the_lease_costs_an_attempt_and_no_byte(
    place: Workplace, request: pytest.FixtureRequest, outage: Outage
) -> None:
    place.start_worker(program=hooked({1: {"wait": "f1-50/renamed"}}), timing=SHORT_LEASE, snapshot_seconds=1e-6)
    job = place.submit(TEXT, **DENSE)
    place.wait_until(lambda: 25 in [row.percent for row in reads.list_checkpoints(place.db, job.id)])
    trainer = place.trainer(job)
    with outage(place, request):
        lease_until = datetime.now(UTC) + timedelta(seconds=SHORT_LEASE.lease)
        assert ended_within(30, trainer)
        time.sleep(max(0.0, (lease_until - datetime.now(UTC)).total_seconds()))  # the fault itself
    done = place.wait_for(job, "succeeded", "failed")
    assert (done.status, done.attempt, done.crashes) == ("succeeded", 2, 0)
    assert place.statuses(job) == ["queued", "running", "queued", "running", "succeeded"]
    resumed = [event["message"] for event in place.events(job, "warning") if event["code"] == "resumed"]
    assert resumed != ["attempt 2 goes on from step 0"]
    assert_undisturbed(place, job, undisturbed("dense"))
