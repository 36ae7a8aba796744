"""A service that runs for one measurement: an API, and workers if needed, with a temporary data folder.

It consists of the processes that users run, with the same settings, on a free port of loopback.
"""

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from service.cli.processes import Processes
from service.database.database import Database
from service.database.opening import open_database
from service.jobs import queue, recording
from service.jobs.new_job import NewJob
from service.jobs.submit import submit_job
from service.jobs.workers import WorkerIdentity, worker_started, worker_stopped
from service.settings import Settings, sqlite_url
from service.storage.job_folders import checkpoint_folder

if TYPE_CHECKING:
    from nanomoe.model.gpt import GPT
    from nanomoe.tokenizer import Tokenizer


@dataclass(frozen=True)
class TemporaryService:
    """A running service, and a connection to its database."""

    url: str
    settings: Settings
    database: Database
    processes: Processes

    def record(self, model: "GPT", tokenizer: "Tokenizer") -> str:
        """Insert a finished job whose only checkpoint holds these weights; returns its id."""
        from safetensors.torch import save

        from nanomoe import checkpoint
        from nanomoe.config import JobConfig

        config = JobConfig.model_validate(model.config.model_dump())
        worker = WorkerIdentity(name="bench")
        worker_started(self.database, worker)
        job, _ = submit_job(self.database, NewJob(text="Era uma vez", config=config.model_dump(mode="json")))
        claim = queue.claim(self.database, worker, 60)
        assert claim is not None
        assert claim.job_id == job.id, "no other job is queued"
        folder = checkpoint_folder(job.id, claim.fence, 100)
        files = {
            **tokenizer.files(),
            checkpoint.CONFIG: checkpoint.to_json(config.model_dump(mode="json")),
            checkpoint.WEIGHTS: save({name: weight.contiguous() for name, weight in model.state_dict().items()}),
        }
        manifest, sha256 = checkpoint.write(self.settings.data_dir / folder, files)
        recording.record_checkpoint(
            self.database,
            claim,
            percent=100,
            step=1,
            epoch=1,
            folder=folder,
            manifest_sha256=sha256,
            files=[entry.model_dump() for entry in manifest.files],
            metrics={},
        )
        queue.finish(self.database, claim, "succeeded")
        worker_stopped(self.database, worker.id)
        return job.id


@contextmanager
def run_service(database_url: str | None = None, **settings: object) -> Iterator[TemporaryService]:
    """Start an API, which is stopped at the end of the block. `settings`: as in `Settings`; the data folder is
    temporary, and so is the database unless `database_url` names an empty one."""
    with tempfile.TemporaryDirectory(prefix="nanomoe-bench-") as folder:
        chosen = {
            "data_dir": folder,
            "database_url": database_url or sqlite_url(Path(folder) / "nanomoe.db"),
            **settings,
        }
        environment = {f"NANOMOE_{name.upper()}": str(value) for name, value in chosen.items()}
        environment |= {"NANOMOE_HOST": "127.0.0.1", "NANOMOE_PORT": "0"}
        logs = Path(folder) / "logs"
        logs.mkdir()
        with Processes(environment, logs=logs) as processes:
            url = processes.start_api()
            here = Settings.model_validate(chosen | {"host": "127.0.0.1", "port": 0})
            with closing(open_database(here)) as database:
                yield TemporaryService(url, here, database, processes)
