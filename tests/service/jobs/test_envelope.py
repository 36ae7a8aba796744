"""The envelope of a job's training loss: what a chart of many jobs reads, equal to what the series itself gives."""

import math
import random

import sqlalchemy as sa

from service.database.database import Database
from service.database.schema import table
from service.jobs import compared_jobs, recording
from service.jobs.compared_jobs import Selection
from service.jobs.envelope import MAX_BUCKETS, LossEnvelope, envelope_of_series
from service.jobs.lease import Claim
from service.jobs.tables import Envelope
from service.jobs.workers import WorkerIdentity
from tests.queued import running


def write(db: Database, held: Claim, first: int, losses: list[float]) -> None:
    steps = list(range(first, first + len(losses)))
    columns = {"step": steps, "train_loss": losses, "lr": losses, "grad_norm": losses}
    recording.record_steps(db, held, columns, {"step": steps[-1]})


def stored(db: Database, held: Claim) -> LossEnvelope:
    with db.read() as session:
        made = envelope_of_series(session, held.job_id)
    ((_, found),) = compared_jobs.read_envelopes(db, Selection(job_ids=[held.job_id]))
    while made.width < found.width:  # what was once long stays wide
        made.double()
    assert found == made
    return found


def test_every_bucket_has_the_extremes_of_its_steps() -> None:
    draw = random.Random(1)  # noqa: S311
    for n in (1, 99, 100, 101, 200, 201, 5000, 65_537):
        losses = [draw.uniform(0, 10) for _ in range(n)]
        envelope = LossEnvelope()
        for first in range(0, n, 777):
            envelope.add(enumerate(losses[first : first + 777], first + 1))
        width = envelope.width
        buckets = [losses[at : at + width] for at in range(0, n, width)]
        assert len(buckets) <= MAX_BUCKETS < 2 * len(buckets) or width == 1
        assert envelope.low == [float(f"{min(bucket):.5g}") for bucket in buckets]
        assert envelope.high == [float(f"{max(bucket):.5g}") for bucket in buckets]
        assert envelope.last_step == n


def test_it_is_kept_as_the_job_goes(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    write(db, held, 1, [5.0, math.nan])
    assert stored(db, held) == LossEnvelope(1, 2, [5.0, None], [5.0, None])
    write(db, held, 3, [3.123456, 2.0])
    write(db, held, 3, [3.123456, 2.0])  # a batch whose commit was in doubt
    assert stored(db, held) == LossEnvelope(1, 4, [5.0, None, 3.1235, 2.0], [5.0, None, 3.1235, 2.0])
    write(db, held, 5, [float(n) for n in range(5, 251)])
    found = stored(db, held)
    assert (found.width, len(found.low), found.low[:2], found.high[:2]) == (4, 63, [2.0, 5.0], [5.0, 8.0])


def test_a_resumed_job_writes_its_last_steps_again(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    write(db, held, 1, [float(n) for n in range(1000, 750, -1)])
    before = stored(db, held)
    write(db, held, 251, [0.5] * 7)
    assert min(low for low in stored(db, held).low if low is not None) == 0.5
    recording.rewind(db, held, 250)
    assert stored(db, held) == before
    recording.rewind(db, held, 3)
    recording.heartbeat(db, held, {"step": 3})
    assert stored(db, held) == LossEnvelope(4, 3, [998.0], [1000.0])
    recording.rewind(db, held, 0)
    write(db, held, 1, [1.0])
    assert stored(db, held).last_step == 1


def test_steps_that_an_earlier_version_wrote_are_added(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    write(db, held, 1, [3.0, 2.0])
    with db.write() as session:
        session.execute(sa.delete(table(Envelope)))
    assert stored(db, held).low == [3.0, 2.0]  # read from the series
    write(db, held, 3, [1.0])
    with db.read() as session:
        assert session.get_one(Envelope, held.job_id).train_loss == [[3.0, 2.0, 1.0]] * 2
