"""Makes a data folder as a version of this project leaves it: every status, and a backup of its database.

    git worktree add --detach FOLDER COMMIT
    PYTHONPATH=FOLDER python tests/upgrade/make_data_folder.py tests/upgrade/revision_0001.tar.xz

runs that commit's API and workers on the smallest of models. The jobs named `killed`, `paused`, `crashed` and
`finished` have one config and one text, so that all must end with the bytes of `finished`, which nobody disturbed; so
have those named `killed ptbr-8k` and `finished ptbr-8k`. Equal checkpoints of equal jobs are stored once (xz).
"""

import os
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from service.client import Client

TEXT = "O rato roeu a roupa do rei de Roma; a rainha, com raiva, resolveu remendar a roupa do rei. " * 2
BYTES: dict[str, Any] = {
    "tokenizer": "bytes", "block_size": 32, "n_layer": 1, "n_head": 1, "n_embd": 8, "batch_size": 2, "epochs": 120,
    "lr": 3e-3, "cont_max_new_tokens": 5,
}  # fmt: skip
PTBR: dict[str, Any] = BYTES | {"tokenizer": "ptbr-8k", "n_embd": 2, "batch_size": 1, "epochs": 150}
SNAPSHOT_SECONDS = 0.5
"""Short, so that the smallest of jobs has one soon."""


@contextmanager
def started(*command: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process of the version that is being recorded; killed at the end, as by a power cut."""
    process = subprocess.Popen([sys.executable, "-m", *command], text=True, **options)
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """The process first: its trainers then end with it, as a killed worker's do."""
    if process.poll() is None:
        left = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        for child in left:
            with suppress(psutil.NoSuchProcess):
                child.kill()


def wait_until(holds: Callable[[], Any]) -> None:
    give_up = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.002)


class Site:
    """A running API, and what its database says."""

    def __init__(self, data: Path, url: str) -> None:
        self.data = data
        self.client = Client(url)

    def submit(self, name: str, config: dict[str, Any], **options: Any) -> str:
        return self.client.submit(TEXT, config, name=name, **options).id

    def ask(self, query: str, *values: Any) -> list[Any]:
        with closing(sqlite3.connect(self.data / "nanomoe.db")) as database:
            return [row[0] for row in database.execute(query, values)]

    def status(self, job_id: str) -> str:
        return str(self.ask("SELECT status FROM jobs WHERE id = ?", job_id)[0])

    def has_snapshot(self, job_id: str) -> bool:
        return bool(self.ask("SELECT 1 FROM snapshots WHERE job_id = ?", job_id))


def fill(site: Site) -> None:
    """Jobs of every kind."""
    with started("worker"):
        finished = site.submit("finished", BYTES)
        parent = site.submit("finished ptbr-8k", PTBR)
        failed = site.submit("failed", BYTES | {"lr": 10.0, "weight_decay": 10.0, "epochs": 400})
        for job in (finished, parent, failed):
            wait_until(lambda job=job: site.status(job) in ("succeeded", "failed"))
        assert [site.status(job) for job in (finished, parent, failed)] == ["succeeded", "succeeded", "failed"]
        paused = site.submit("paused", BYTES)
        wait_until(lambda: site.has_snapshot(paused))
        site.client.job(paused).pause()
        wait_until(lambda: site.status(paused) == "paused")
    with started("worker") as worker:
        crashed = site.submit("crashed", BYTES)
        wait_until(lambda: site.has_snapshot(crashed))
        for trainer in psutil.Process(worker.pid).children():
            trainer.kill()
        wait_until(lambda: site.status(crashed) == "queued")
    with started("worker", "--slots", "2") as worker:
        killed = [site.submit("killed ptbr-8k", PTBR), site.submit("killed", BYTES)]
        wait_until(lambda: all(site.has_snapshot(job) for job in killed))
        kill(worker)
    assert [site.status(job) for job in killed] == ["running", "running"]
    site.submit("queued", BYTES)
    site.submit("queued ptbr-8k", PTBR, priority=1)
    site.submit("queued child", PTBR | {"init_from": {"job_id": parent}})
    site.submit("dated", BYTES, run_at=datetime.now(UTC) + timedelta(minutes=10))
    cancelled = site.submit("cancelled", BYTES)
    site.client.job(cancelled).cancel()


def main(target: Path) -> None:
    """Write the folder to `target`, a .tar.xz."""
    with TemporaryDirectory() as folder:
        data, backup = Path(folder) / "data", Path(folder) / "backup"
        backup.mkdir()
        os.environ |= {
            "NANOMOE_DATA_DIR": str(data), "NANOMOE_SNAPSHOT_SECONDS": str(SNAPSHOT_SECONDS), "NANOMOE_PORT": "0",
            "NANOMOE_LEASE_SECONDS": "10", "OMP_NUM_THREADS": "1", "NANOMOE_STEP_PATH": "eager",
        }  # fmt: skip
        with started("service", stdout=subprocess.PIPE) as api:
            assert api.stdout is not None
            fill(Site(data, api.stdout.readline().split()[-1]))
            nanomoe = [sys.executable, "-c", "from service.cli import main; main()"]
            subprocess.run([*nanomoe, "backup", str(backup / "nanomoe.db")], check=True)
        with tarfile.open(target, "w:xz", preset=9) as archive:
            for path in (data, backup):
                archive.add(path, path.name)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main(Path(sys.argv[1]).absolute())
