"""A real API on a free port, and jobs in any state, made with the same functions that a worker calls.

Its fixtures are `api`, one server for a whole test file, `serve`, for a server with settings of its own, and
`generating_api`, whose engine several files share.
"""

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from uuid import uuid4

import httpx
import pytest

from nanomoe import checkpoint
from nanomoe.tokenizer import load_tokenizer
from service.__main__ import Server
from service.app import create_app
from service.database.database import Database
from service.generation.admission import _Load, _Pending
from service.http.context import Context
from service.jobs import queue, reads, recording
from service.jobs.lease import Claim
from service.jobs.workers import WorkerIdentity
from service.settings import Settings
from service.storage.job_folders import checkpoint_folder

_BYTES = load_tokenizer("bytes")

TEXT = "O gato dorme no sofá, e o rato rói a roupa do rei de Roma. 🐈"


@dataclass
class Api:
    """A running service."""

    url: str
    context: Context
    http: httpx.Client
    loop: asyncio.AbstractEventLoop
    server: Server
    worker: WorkerIdentity = field(default_factory=lambda: WorkerIdentity(name="test"))

    @property
    def db(self) -> Database:
        return self.context.database

    def fill_generation(self) -> None:
        """Let every place of generation be taken for good; with `engine_max_waiting=0`, whoever asks is refused."""
        generation = self.context.generation
        everything = _Load(n_continuations=self.context.settings.engine_max_running)
        for number, load in enumerate((everything, _Load(n_questions=1))):
            generation._pending[-number] = _Pending(load)

    def submit(self, **changes: Any) -> dict[str, Any]:
        """A queued job, through the API."""
        answer = self.http.post("/jobs", json={"text": TEXT, "config": {"tokenizer": "bytes"}} | changes)
        assert answer.status_code == 201, answer.text
        job: dict[str, Any] = answer.json()
        return job

    def claim(self, job_id: str) -> Claim:
        """Take a job as a worker does; others that wait are held back meanwhile."""
        for job in reads.list_jobs(self.db, reads.JobFilter(status="queued")):
            if job.id != job_id:
                queue.request_pause(self.db, job.id)
        claim = queue.claim(self.db, self.worker, lease_seconds=60)
        assert claim is not None
        assert claim.job_id == job_id
        return claim

    def running(self, **changes: Any) -> Claim:
        """A job that a worker has begun, with three steps and the checkpoint before training."""
        claim = self.claim(self.submit(**changes)["id"])
        model = {"n_params": 1000, "n_active_params": 1000}
        execution = {"device": "cpu", "precision": "float32"}
        recording.record_prepared(self.db, claim, execution=execution, n_tokens=64, total_steps=500, model=model)
        self.record_checkpoint(claim, 0, 0)
        self.record_steps(claim, 1, 3)
        return claim

    def finished(self, **changes: Any) -> str:
        """The id of a job that has succeeded, with checkpoints at 0 and 100 percent."""
        claim = self.running(**changes)
        self.record_checkpoint(claim, 100, 500)
        queue.finish(self.db, claim, "succeeded", progress={"step": 500, "epoch": 500, "percent": 100.0})
        return claim.job_id

    def submit_sweep(self, **changes: Any) -> dict[str, Any]:
        """A sweep whose jobs are queued, through the API: two of them, unless `changes` say otherwise."""
        request = {"text": TEXT, "config": {"tokenizer": "bytes"}} | ({} if "points" in changes else {"seeds": 2})
        answer = self.http.post("/sweeps", json=request | changes)
        assert answer.status_code == 201, answer.text
        sweep: dict[str, Any] = answer.json()
        return sweep

    def submit_finished_sweep(self, **changes: Any) -> str:
        """The id of a sweep all of whose jobs have succeeded, with checkpoints at 0 and 100 percent."""
        sweep = self.submit_sweep(**changes)
        for job_id in sweep["job_ids"]:
            self.finish(self.claim(job_id))
            self.http.post(f"/sweeps/{sweep['id']}/resume")
        return str(sweep["id"])

    def finish(self, claim: Claim, loss: float = 2.0) -> None:
        """Train a claimed job to its end: three steps, and a loss of `loss` at the last checkpoint."""
        model = {"n_params": 1000, "n_active_params": 1000}
        recording.record_prepared(self.db, claim, execution={"device": "cpu"}, n_tokens=64, total_steps=3, model=model)
        self.record_checkpoint(claim, 0, 0)
        self.record_steps(claim, 1, 3)
        self.record_checkpoint(claim, 100, 3, loss=loss, perplexity=2.718281828**loss)
        queue.finish(self.db, claim, "succeeded", progress={"step": 3, "epoch": 3, "percent": 100.0})

    def train_queued(self, *losses: float) -> None:
        """Train as many jobs as losses are given, each once it is queued, to that loss."""
        for loss in losses:
            while (claim := queue.claim(self.db, self.worker, lease_seconds=60)) is None:
                self.db.changes.wait(0.1)
            self.finish(claim, loss)

    def stopped_early(self, *, reason: str | None, **changes: Any) -> str:
        """The id of a job that needed 42 of its 500 steps; without a reason as one of before there were any."""
        claim = self.running(**changes)
        progress = {"step": 42, "epoch": 42, "percent": 8.4, "eta_seconds": 91.6}
        self.record_checkpoint(claim, 100, 42, stopped_early=True, perplexity=1.987)
        queue.finish(self.db, claim, "succeeded", reason=reason, progress=progress)
        return claim.job_id

    def record_steps(self, claim: Claim, first: int, last: int) -> None:
        """Steps `first` to `last`, with a loss of 10 / step."""
        step = list(range(first, last + 1))
        columns = {"step": step, "train_loss": [10 / s for s in step], "lr": [1e-4] * len(step),
                   "grad_norm": [1.0] * len(step)}  # fmt: skip
        progress = {"step": last, "total_steps": 500, "epoch": last, "percent": last / 5, "tok_per_sec": 100.0,
                    "eta_seconds": 5.0}  # fmt: skip
        recording.record_steps(self.db, claim, columns, progress)

    def record_checkpoint(
        self, claim: Claim, percent: int, step: int, files: dict[str, bytes] | None = None, **figures: Any
    ) -> None:
        """A checkpoint whose files are really there: small ones, or those given. `figures`: unlike `metrics()`."""
        folder = checkpoint_folder(claim.job_id, claim.fence, percent)
        files = files or {"config.json": b"{}\n", "model.safetensors": bytes(range(256)) * 4, **_BYTES.files()}
        manifest, sha256 = checkpoint.write(self.context.store / folder, files)
        recording.record_checkpoint(
            self.db,
            claim,
            percent=percent,
            step=step,
            epoch=step,
            folder=folder,
            manifest_sha256=sha256,
            files=[entry.model_dump(mode="json") for entry in manifest.files],
            metrics=metrics() | figures,
        )


def metrics() -> dict[str, Any]:
    """A checkpoint's figures, as the trainer sends them."""
    tokens = [
        {"target": letter, "predicted": "a", "loss": 0.5, "id": ord(letter), "byte_offset": 1 + place}
        for place, letter in enumerate("bcdefghij")
    ]
    return {
        "loss": 2.0,
        "perplexity": 7.389,
        "bits_per_byte": 2.88,
        "train_loss": None,
        "accuracy": 0.25,
        "tok_per_sec": None,
        "val_loss": None,
        "baselines": {"uniform": 5.5, "unigram": 3.0, "bigram": 1.0},
        "reconstruction": {"text": "aaaaaaaaa", "tokens": tokens, "truncated": False},
        "continuation": {"prompt": "abc", "text": "def"},
        "moe": None,
    }


@contextmanager
def serving(settings: Settings) -> Iterator[Api]:
    """A server in a thread of its own, until the block ends."""
    listening: SimpleQueue[tuple[str, asyncio.AbstractEventLoop] | BaseException] = SimpleQueue()
    app = create_app(settings)
    server = Server(app, settings, lambda url: listening.put((url, asyncio.get_running_loop())))

    def run() -> None:
        try:
            asyncio.run(server.serve_until_stopped())
        except BaseException as error:
            listening.put(error)
            raise

    thread = threading.Thread(target=run, name="api")
    thread.start()
    started = listening.get(timeout=120)
    if isinstance(started, BaseException):
        thread.join()
        raise started
    url, loop = started
    try:
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as http:
            yield Api(url, app.state.context, http, loop, server)
    finally:
        if thread.is_alive():
            loop.call_soon_threadsafe(server.stop)
        thread.join()


Serve = Callable[..., Api]


@pytest.fixture
def serve(tmp_path: Path, migrated_sqlite: Path) -> Iterator[Serve]:
    """`serve(max_queued=1)`: a server with an empty database and these settings."""
    with ExitStack() as servers:

        def start(**changes: Any) -> Api:
            return servers.enter_context(serving(settings_of(tmp_path / uuid4().hex, migrated_sqlite, **changes)))

        yield start


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path) -> Iterator[Api]:
    """One server for all tests of a file; each makes its own jobs."""
    with serving(settings_of(tmp_path_factory.mktemp("api"), migrated_sqlite)) as running:
        yield running


@pytest.fixture(scope="session")
def generating_api(tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path) -> Iterator[Api]:
    """One server for all tests of the files that take it, because its engine takes three seconds of CPU to start: what
    they ask for is about jobs of their own, and they leave its limits and its engine alone.

    On a CPU its engine has its compiled loops: as long as they are being prepared, the same request may be answered
    with other last bits than a moment before.
    """
    import torch  # not on top: the process that hands out the tests imports this file too

    from tests.service.tiny_checkpoint import tiny_files

    with serving(settings_of(tmp_path_factory.mktemp("api"), migrated_sqlite)) as running:
        claim = running.claim(running.submit()["id"])
        running.record_checkpoint(claim, 100, 500, tiny_files(tmp_path_factory.mktemp("tiny") / "checkpoint"))
        queue.finish(running.db, claim, "succeeded")
        request = {"job_id": claim.job_id, "prompt": "Era", "max_new_tokens": 1}
        give_up = time.monotonic() + 120
        while not torch.cuda.is_available():
            answer = running.http.post("/generate", json=request)
            assert answer.status_code == 200, answer.text
            if "compiled loops" in answer.json()["numerics"]:
                break
            assert time.monotonic() < give_up, "the engine does without its compiled loops"
            time.sleep(0.05)
        yield running


def settings_of(data_dir: Path, migrated_sqlite: Path, **changes: Any) -> Settings:
    """Settings of a server with an empty database in a new data folder."""
    data_dir.mkdir(exist_ok=True)
    shutil.copy(migrated_sqlite, data_dir / "nanomoe.db")
    merged: dict[str, Any] = {"data_dir": data_dir, "port": 0, "engine_preload": False} | changes
    return Settings(_env_file=None, **merged)
