"""The bucket is out of reach while a job is trained: nothing is lost, and no crash is counted."""

import time

import pytest

from nanomoe.config import JobConfig
from nanomoe.store.store import StoreUnavailable
from service.database.database import Database
from service.settings import Settings
from tests.buckets import Proxy, Request, S3Server, failure
from tests.databases import ONLY_SQLITE
from tests.faults.undisturbed import DENSE, TEXT, assert_undisturbed, hooked, train_undisturbed
from tests.worker.workplace import SHORT_LEASE, Workplace

SHORT = DENSE | {"epochs": 8}
AWAY = failure("503 Service Unavailable", "ServiceUnavailable")


@ONLY_SQLITE
@pytest.mark.parametrize("longer_than_it_is_asked", [False, True])
def test_a_store_that_is_away_for_a_while_delays_a_job_and_loses_nothing(
    db: Database, settings: Settings, proxy: Proxy, s3_server: S3Server, longer_than_it_is_asked: bool
) -> None:
    place = Workplace(db, settings.model_copy(update={"store": f"s3://{s3_server.make_bucket()}/a"}))
    away: list[Request] = []

    def decide(request: Request) -> bytes | None:
        if "/f1-25/" in request.path or away:
            away.append(request)
            return AWAY
        return None

    proxy.decide = decide
    hooks = {1: {}} | ({"retries": 0.5} if longer_than_it_is_asked else {"retries": 60})
    try:
        place.start_worker(
            program=hooked(hooks),
            timing=SHORT_LEASE,
            backoff_seconds=1,
            snapshot_seconds=1e-6 if longer_than_it_is_asked else 60,
        )
        job = place.submit(TEXT, **SHORT)
        if longer_than_it_is_asked:
            reason = place.wait_until(lambda: (now := place.job(job)).status == "queued" and now.status_reason)
            assert reason == f"waits 1 s after an error outside of the job: {StoreUnavailable.summary}"
            # The worker asks for the store, and leaves the job to those that reach it.
            n_before = len(away)
            place.wait_until(lambda: any(request.path.endswith("/installation") for request in away[n_before:]))
            waits_until = time.monotonic() + 1
            place.wait_until(lambda: time.monotonic() > waits_until)
            assert place.job(job).attempt == 1
        else:
            place.wait_until(lambda: len(away) > 8)
            # Longer than the lease: heartbeats go on meanwhile.
            lease_passes_at = time.monotonic() + SHORT_LEASE.lease
            place.wait_until(lambda: time.monotonic() > lease_passes_at)
        proxy.decide = lambda _: None
        done = place.wait_for(job, "succeeded", "failed")
        assert (done.status, done.crashes, done.attempt) == ("succeeded", 0, 1 + longer_than_it_is_asked)
        assert_undisturbed(place, job, train_undisturbed(JobConfig(**SHORT)))
    finally:
        place.end()
