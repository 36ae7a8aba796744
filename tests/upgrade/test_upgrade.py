"""A data folder that an earlier version left is opened, migrated, and every job in it goes on.

`make_data_folder.py` says what is in it. Where a processor rounds as the one did that recorded it, unfinished jobs end
with the bytes that the earlier version gave the job that nobody disturbed; on another one the first steps, done there,
and the last ones, done here, are rounded differently, and no undisturbed run has those bytes. What must hold everywhere
is that a job ends with the bytes that the library makes of its snapshot.
"""

import hashlib
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from nanomoe import checkpoint
from nanomoe.config import JobConfig
from nanomoe.training.loop import Recorded, train
from nanomoe.training.run import prepare
from service.access.keys import create_key
from service.database import migrate
from service.database.caller import Caller
from service.database.opening import open_database
from service.database.schema import table
from service.jobs import compared_jobs, queue, reads
from service.jobs.compared_jobs import Selection
from service.jobs.envelope import envelope_of_series
from service.jobs.statuses import TERMINAL
from service.jobs.tables import Envelope, Job
from service.settings import Settings
from service.storage import fsck
from service.storage.opening import open_store
from tests.faults.undisturbed import hooked, train_undisturbed
from tests.upgrade.make_data_folder import BYTES, TEXT
from tests.worker.workplace import Workplace

RECORDED = sorted(Path(__file__).parent.glob("revision_*.tar.xz"))
"""A data folder of each earlier revision of the schema."""

GOES_ON = {"paused": "finished", "crashed": "finished", "killed": "finished", "killed ptbr-8k": "finished ptbr-8k"}
"""What has a snapshot, and the job of equal config and text that ended undisturbed."""


@pytest.fixture(scope="module", params=RECORDED, ids=lambda path: path.name.partition(".")[0])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders `data` and `backup`."""
    folder = tmp_path_factory.mktemp("recorded")
    with tarfile.open(request.param) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # noqa: S202 - filter: since 3.11.4
    return folder


@pytest.fixture
def place(recorded: Path, tmp_path: Path) -> Iterator[Workplace]:
    """The data folder, opened as the API opens it."""
    shutil.copytree(recorded / "data", tmp_path / "data")
    yield from opened(tmp_path / "data")


@pytest.fixture
def restored(recorded: Path, tmp_path: Path) -> Iterator[Workplace]:
    """The backup, with the files of the jobs copied to it."""
    shutil.copytree(recorded / "backup", tmp_path / "data")
    shutil.copytree(recorded / "data" / "jobs", tmp_path / "data" / "jobs")
    shutil.copy(recorded / "data" / "installation", tmp_path / "data")
    yield from opened(tmp_path / "data")


def opened(data_dir: Path) -> Iterator[Workplace]:
    settings = Settings(_env_file=None, data_dir=data_dir)
    db = open_database(settings)
    migrate.upgrade(db)
    workplace = Workplace(db, settings)
    yield workplace
    workplace.end()
    db.close()


def by_name(place: Workplace) -> dict[str, Job]:
    return {str(job.name): job for job in reads.list_jobs(place.db)}


def weights(place: Workplace, job: Job) -> str:
    """The SHA-256 of a finished job's weights."""
    (found,) = (
        file for file in reads.get_checkpoint(place.db, job.id, 100).files if file["name"] == "model.safetensors"
    )
    return str(found["sha256"])


def resume_with_the_library(place: Workplace, job: Job) -> str:
    """The SHA-256 of the weights that a job's snapshot leads to, with no worker and no queue."""
    snapshot = reads.find_snapshot(place.db, job.id)
    assert snapshot is not None
    assert job.execution is not None
    opened = checkpoint.open(place.settings.data_dir / snapshot.folder, snapshot.manifest_sha256)
    run = prepare(
        JobConfig.model_validate(job.config),
        TEXT,
        opened.tokenizer(),
        recorded_execution=job.execution,
        resume=opened.read_all(),
    ).run
    files = {one.percent: one.files for one in train(run) if isinstance(one, Recorded)}
    return hashlib.sha256(files[100]["model.safetensors"]).hexdigest()


def check_envelopes(place: Workplace) -> None:
    """Every job has the envelope of its series, and its reconstructions apart from the figures."""
    ids = [job.id for job in by_name(place).values()]
    with place.db.read() as session:
        made = {job_id: envelope_of_series(session, job_id) for job_id in ids}
        stored = set(session.scalars(sa.select(table(Envelope).c.job_id)))
    assert stored == {job_id for job_id in ids if made[job_id].last_step > 0}
    assert dict(compared_jobs.read_envelopes(place.db, Selection(job_ids=ids))) == made
    for job_id in ids:
        for recorded in reads.list_checkpoints(place.db, job_id):
            assert "reconstruction" not in recorded.metrics
            assert recorded.reconstruction is not None


def test_every_job_of_an_older_data_folder_goes_on_to_its_end(place: Workplace) -> None:
    jobs = by_name(place)
    assert {name: job.status for name, job in jobs.items()} == {
        "finished": "succeeded", "finished ptbr-8k": "succeeded", "failed": "failed", "cancelled": "cancelled",
        "paused": "paused", "killed": "running", "killed ptbr-8k": "running", "crashed": "queued",
        "queued": "queued", "queued ptbr-8k": "queued", "queued child": "queued", "dated": "queued",
    }  # fmt: skip
    assert {name for name, job in jobs.items() if job.run_at is not None} == {"dated"}
    assert fsck.check(place.db, open_store(place.settings)).is_clean
    check_envelopes(place)
    expected = {name: resume_with_the_library(place, jobs[name]) for name in GOES_ON}
    rounds_alike = train_undisturbed(JobConfig(**BYTES), TEXT).files[100]["model.safetensors"] == weights(
        place, jobs["finished"]
    )

    queue.resume(place.db, jobs["paused"].id)
    dated = jobs.pop("dated")
    with place.db.write() as session:  # the clock of this machine may be behind that of the recording one
        session.execute(sa.update(table(Job)).values(waits_since=None, waits_seconds=None))
        session.execute(sa.update(table(Job)).where(table(Job).c.id == dated.id).values(run_at=None))
    place.start_worker(program=hooked({}), slots=2)
    for name, job in {**jobs, "dated": dated}.items():
        ended = place.wait_for(job, *TERMINAL, timeout=120)
        assert (name, ended.status) == (name, job.status if job.status in TERMINAL else "succeeded")
    assert {name: weights(place, jobs[name]) for name in GOES_ON} == expected
    check_envelopes(place)
    if rounds_alike:
        assert expected == {name: weights(place, jobs[undisturbed]) for name, undisturbed in GOES_ON.items()}
    assert fsck.check(place.db, open_store(place.settings)).is_clean


def test_what_was_there_before_keys_is_the_admins_and_its_bytes_are_known(place: Workplace) -> None:
    made = create_key(place.db, "ana", "member")
    ana = place.db.acting_as(Caller("ana", sees_all=False, key_id=made.id))
    assert {job.owner for job in reads.list_jobs(place.db)} == {""}
    assert reads.list_jobs(ana) == []
    for job in reads.list_jobs(place.db):
        for recorded in reads.list_checkpoints(place.db, job.id):
            assert recorded.n_bytes == sum(file["size"] for file in recorded.files) > 0


def test_an_older_backup_is_restored(restored: Workplace) -> None:
    assert fsck.check(restored.db, open_store(restored.settings)).is_clean
    assert len(by_name(restored)) == 12
    assert restored.submit().seq == 13
