"""Which checkpoints are listed as models, on SQLite and on PostgreSQL."""

import pytest

from service.database.database import Database
from service.jobs import recording
from service.jobs.addressing import list_models
from service.jobs.workers import WorkerIdentity
from tests.queued import CHECKPOINT, running


def test_models_are_listed_by_the_order_of_their_jobs_whatever_the_ids(
    db: Database, worker: WorkerIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = iter(("b" * 32, "a" * 32))
    monkeypatch.setattr("service.jobs.submit.new_id", lambda: next(ids))
    for _ in range(2):
        held = running(db, worker)
        for percent in (0, 25):
            recording.record_checkpoint(db, held, percent=percent, **CHECKPOINT)
    listed = [found.model_id for found in list_models(db)]
    assert listed == [f"{letter * 32}@{percent}" for letter in "ab" for percent in (25, 0)]
