"""A job that was killed, however often and wherever, ends with exactly the bytes of one that was not."""

import json
import random
from dataclasses import dataclass
from typing import Any

import pytest

from nanomoe import checkpoint
from nanomoe.config import JobConfig
from service import queue, store
from service.store import Job
from tests.databases import ONLY_SQLITE
from tests.worker.workplace import HERE, Workplace

TEXT = "O rato roeu a roupa do rei de Roma; a rainha, com raiva, resolveu remendar a roupa do rei. " * 2
DENSE: dict[str, Any] = {
    "tokenizer": "bytes", "block_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 16, "batch_size": 2, "epochs": 40,
    "lr": 3e-3, "lr_schedule": "cosine", "warmup_steps": 5, "val_fraction": 0.1, "cont_max_new_tokens": 5,
}  # fmt: skip
MOE: dict[str, Any] = DENSE | {
    "n_layer": 2, "use_moe": True, "n_experts": 4, "router_noise": True, "router_bias_update_rate": 0.01,
    "capacity_factor": 1.0, "gradient_accumulation_steps": 2,
}  # fmt: skip
CONFIGS = {"dense": DENSE, "moe": MOE}


@dataclass(frozen=True)
class Undisturbed:
    """What the library itself makes of a config, with no worker, no queue and no interruption."""

    files: dict[int, dict[str, str]]
    """{percent: {name: sha256}}."""
    metrics: dict[int, dict[str, Any]]
    steps: list[tuple[int, float, float, float]]


def train_undisturbed(config: JobConfig) -> Undisturbed:
    import hashlib

    import torch

    from nanomoe.execution import Execution
    from nanomoe.tokenizer import load_tokenizer
    from nanomoe.train import Recorded, Run, Steps, train

    tokenizer = load_tokenizer(config.tokenizer)
    tokens = tokenizer.encode(TEXT)
    execution = Execution.decide(config, "cpu", n_tokens=len(tokens))
    found = Undisturbed({}, {}, [])
    for happened in train(Run(config, tokens, tokenizer, execution, device=torch.device("cpu"))):
        if isinstance(happened, Recorded):
            found.files[happened.percent] = {
                name: hashlib.sha256(content).hexdigest() for name, content in happened.files.items()
            }
            found.metrics[happened.percent] = happened.metrics
        elif isinstance(happened, Steps):
            found.steps.extend(zip(happened.step, happened.train_loss, happened.lr, happened.grad_norm, strict=True))
    return found


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Undisturbed]:
    return {name: train_undisturbed(JobConfig(**config)) for name, config in CONFIGS.items()}


def assert_equal(place: Workplace, job: Job, expected: Undisturbed) -> None:
    """Every byte of every checkpoint, every metric and every step."""
    rows = store.list_checkpoints(place.db, job.id)
    assert [row.percent for row in rows] == [0, 25, 50, 75, 100]
    for row in rows:
        files = {file["name"]: file["sha256"] for file in row.files}
        assert files == expected.files[row.percent], f"at {row.percent} %"
        checkpoint.verify(place.settings.data_dir / row.folder, row.manifest_sha256)
        metrics = {name: value for name, value in row.metrics.items() if name != "tok_per_sec"}
        assert metrics == json.loads(json.dumps(expected.metrics[row.percent]))
    steps = [tuple(row) for row in store.steps_after(place.db, job.id, 0, 100_000)]
    assert steps == expected.steps


def hooked(hooks: dict[int, dict[str, Any]]) -> list[str]:
    return [str(HERE / "hooked_trainer.py"), json.dumps(hooks)]


@ONLY_SQLITE
@pytest.mark.parametrize("name", CONFIGS)
def test_a_job_killed_at_random_points_ends_with_the_bytes_of_an_undisturbed_one(
    place: Workplace, undisturbed: dict[str, Undisturbed], name: str
) -> None:
    chance = random.Random(20261122)  # noqa: S311 - the points are the same every time
    hooks = {attempt: {"line": chance.randint(1, 12)} for attempt in range(1, 4)}
    place.start_worker(program=hooked(hooks), max_crashes=100, snapshot_seconds=0.05)
    job = place.submit(TEXT, **CONFIGS[name])
    done = place.wait_for(job, "succeeded", "failed", timeout=200)
    assert (done.status, done.attempt) == ("succeeded", 4)
    assert_equal(place, job, undisturbed[name])


@ONLY_SQLITE
def test_death_at_every_point_of_a_commit_loses_nothing(place: Workplace, undisturbed: dict[str, Undisturbed]) -> None:
    points = ["f1-50/wrote model.safetensors", "f2-50/flushed", "f3-50/renamed"]
    hooks = {attempt: {"point": point} for attempt, point in enumerate(points, 1)}
    place.start_worker(program=hooked(hooks), max_crashes=100)
    job = place.submit(TEXT, **DENSE)
    done = place.wait_for(job, "succeeded", "failed", timeout=200)
    assert (done.status, done.attempt) == ("succeeded", len(points) + 1)
    assert_equal(place, job, undisturbed["dense"])


@ONLY_SQLITE
def test_a_full_disk_pauses_the_job_which_loses_nothing(place: Workplace, undisturbed: dict[str, Undisturbed]) -> None:
    place.start_worker(program=hooked({1: {"full": "f1-75/wrote config.json"}}))
    job = place.submit(TEXT, **DENSE)
    paused = place.wait_for(job, "paused", "succeeded", "failed", timeout=100)
    assert paused.status == "paused"
    assert "disk is full" in (paused.status_reason or "")
    assert [row.percent for row in store.list_checkpoints(place.db, job.id)] == [0, 25, 50]
    queue.resume(place.db, job.id)
    place.wait_for(job, "succeeded", timeout=100)
    assert_equal(place, job, undisturbed["dense"])


@ONLY_SQLITE
def test_a_paused_job_ends_with_the_same_bytes(place: Workplace, undisturbed: dict[str, Undisturbed]) -> None:
    # The commit of the first quarter waits for the request, and training waits for the commit.
    place.start_worker(program=hooked({1: {"hold": "f1-25/renamed"}}))
    job = place.submit(TEXT, **DENSE)
    place.wait_until(lambda: store.list_checkpoints(place.db, job.id))
    queue.request_pause(place.db, job.id)
    place.wait_for(job, "paused")
    assert store.find_snapshot(place.db, job.id) is not None
    queue.resume(place.db, job.id)
    assert place.wait_for(job, "succeeded").attempt == 2
    assert_equal(place, job, undisturbed["dense"])


@ONLY_SQLITE
@pytest.mark.parametrize(
    "hooks",
    [{1: {"line": 3, "starved": True}}, {1: {"fits": 3, "line": 7}, 2: {"fits": 3}}],
    ids=["killed", "refused by torch and then killed"],
)
def test_a_job_whose_micro_batch_was_halved_trains_on_the_same_windows(
    place: Workplace, hooks: dict[int, dict[str, Any]]
) -> None:
    place.start_worker(program=hooked(hooks))
    job = place.submit(TEXT, **DENSE | {"batch_size": 4})
    done = place.wait_for(job, "succeeded", "failed", timeout=100)
    assert (done.status, done.attempt, done.execution["micro_batch"]) == ("succeeded", 2, 2)
    expected = train_undisturbed(JobConfig(**DENSE | {"batch_size": 2, "gradient_accumulation_steps": 2}))
    weights = {
        row.percent: {file["name"]: file["sha256"] for file in row.files}[checkpoint.WEIGHTS]
        for row in store.list_checkpoints(place.db, job.id)
    }
    assert weights == {percent: files[checkpoint.WEIGHTS] for percent, files in expected.files.items()}
    assert [tuple(row) for row in store.steps_after(place.db, job.id, 0, 100_000)] == expected.steps
    codes = [event["code"] for event in place.events(job, "warning")]
    assert (codes.count("micro_batch_halved"), codes.count("resume_not_exact")) == (1, 1)
