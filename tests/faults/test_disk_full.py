"""The disk is full: the job pauses and says so, what was recorded stays, and resumed it ends with the same bytes.

On a small disk of its own where one can be mounted (as root, on Linux). Everywhere, the kernel's limit on the size of a
file refuses a write as really, and a hook says that the disk is full at one exact point.
"""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import sqlalchemy as sa

from service.database.opening import open_database
from service.jobs import queue, reads
from service.jobs.labels import relabel
from service.jobs.tables import Job
from service.settings import Settings
from tests.databases import ONLY_SQLITE
from tests.faults.undisturbed import DENSE, TEXT, assert_undisturbed, hooked, undisturbed
from tests.worker.workplace import Workplace, ended_within


@ONLY_SQLITE
@pytest.mark.parametrize("refusal", ["full", "limit"])
def test_a_write_that_the_system_refuses_pauses_the_job_which_loses_nothing(place: Workplace, refusal: str) -> None:
    place.start_worker(program=hooked({1: {refusal: "f1-75/wrote config.json"}}))
    job = place.submit(TEXT, **DENSE)
    assert_paused(place, job, [0, 25, 50])
    queue.resume(place.db, job.id)
    place.wait_for(job, "succeeded", "failed")
    assert_undisturbed(place, job, undisturbed("dense"))


def assert_paused(place: Workplace, job: Job, percents: list[int]) -> None:
    """Once the job has paused: for this reason, and with these checkpoints."""
    paused = place.wait_for(job, "paused", "succeeded", "failed")
    assert paused.status == "paused"
    assert "the disk is full" in (paused.status_reason or "")
    assert (paused.crashes, [row.percent for row in reads.list_checkpoints(place.db, job.id)]) == (0, percents)


class SmallDisk:
    """Eight megabytes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
        subprocess.run(mount, check=True, capture_output=True)
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        """To the last byte."""
        with suppress(OSError), self._ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    def make_room(self) -> None:
        self._ballast.unlink()

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


def can_mount() -> bool:
    """Whether this system lets us have a disk of our own."""
    with TemporaryDirectory() as folder:
        try:
            SmallDisk(Path(folder) / "disk").unmount()
        except (OSError, subprocess.CalledProcessError):
            return False
    return True


@contextmanager
def place_on(disk: SmallDisk, database: Path, migrated: Path) -> Iterator[Workplace]:
    """A workplace whose files lie on the small disk, and its SQLite database in the file `database`."""
    shutil.copy(migrated, database)
    settings = Settings(_env_file=None, data_dir=disk.folder, database_url=f"sqlite:///{database}")
    db = open_database(settings)
    found = Workplace(db, settings)
    try:
        yield found
    finally:
        found.end()
        db.close()


if can_mount():  # not skipped elsewhere: there the limit above is the real refusal

    @pytest.fixture
    def disk(tmp_path: Path) -> Iterator[SmallDisk]:
        found = SmallDisk(tmp_path / "disk")
        yield found
        found.unmount()

    @pytest.mark.parametrize("database", ["elsewhere", "on the same disk"])
    def test_a_disk_that_fills_up_pauses_the_job_which_goes_on_when_there_is_room(
        disk: SmallDisk, tmp_path: Path, migrated_sqlite: Path, database: str
    ) -> None:
        file = (tmp_path if database == "elsewhere" else disk.folder) / "nanomoe.db"
        with place_on(disk, file, migrated_sqlite) as place:
            place.start_worker(program=hooked({1: {"wait": "f1-50/wrote config.json"}}))
            job = place.submit(TEXT, **DENSE)
            place.wait_until(lambda: 25 in [row.percent for row in reads.list_checkpoints(place.db, job.id)])
            trainer = place.trainer(job)  # while it waits: once it has ended there is none to be found
            disk.fill()
            (place.folder(job) / "go").touch()
            assert ended_within(60, trainer)
            if database == "elsewhere":
                assert_paused(place, job, [0, 25])
                assert relabel(place.db, job.id, {"name": "written"}).name == "written"
            else:
                assert place.job(job).status in ("running", "paused")
            disk.make_room()
            assert_paused(place, job, [0, 25])
            with place.db.read() as session:
                assert session.execute(sa.text("PRAGMA integrity_check")).scalar_one() == "ok"
            queue.resume(place.db, job.id)
            assert place.wait_for(job, "succeeded", "failed").status == "succeeded"
            assert_undisturbed(place, job, undisturbed("dense"))

    def test_a_worker_that_starts_on_a_full_disk_waits_for_room(
        disk: SmallDisk, tmp_path: Path, migrated_sqlite: Path
    ) -> None:
        with place_on(disk, tmp_path / "nanomoe.db", migrated_sqlite) as place:
            disk.fill()
            worker = place.start_worker("succeed")
            place.wait_until(lambda: list((disk.folder / "locks").glob("*")))
            job = place.submit()
            assert worker.wait(1) is None
            assert place.job(job).status == "queued"
            disk.make_room()
            assert place.wait_for(job, "succeeded", "paused", "failed").status == "succeeded"

    def test_a_job_that_begins_on_a_full_disk_pauses(disk: SmallDisk, tmp_path: Path, migrated_sqlite: Path) -> None:
        with place_on(disk, tmp_path / "nanomoe.db", migrated_sqlite) as place:
            place.start_worker("succeed")
            place.wait_for(place.submit(), "succeeded")
            disk.fill()
            job = place.submit()
            assert_paused(place, job, [])
            disk.make_room()
            queue.resume(place.db, job.id)
            place.wait_for(job, "succeeded")
