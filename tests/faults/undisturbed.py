"""What a job must end with, however it was disturbed: every byte that the library itself makes of its config, with no
worker, no queue and no interruption.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanomoe import checkpoint
from nanomoe.config import JobConfig
from service.jobs import reads
from service.jobs.tables import LARGE_METRICS, Job
from service.storage.opening import open_store
from tests.worker.workplace import HERE, Workplace

if TYPE_CHECKING:
    from nanomoe.training.loop import Happened

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
    """What a training run leaves."""

    files: dict[int, dict[str, str]]
    """{percent: {name: sha256}}."""
    metrics: dict[int, dict[str, Any]]
    steps: list[tuple[int, float, float, float]]

    def add(self, happened: "Happened") -> None:
        """Add what a training loop yielded."""
        from nanomoe.training.loop import Recorded, Steps

        if isinstance(happened, Recorded):
            files = {name: hashlib.sha256(content).hexdigest() for name, content in happened.files.items()}
            self.files[happened.percent] = files
            self.metrics[happened.percent] = happened.metrics.to_row()
        elif isinstance(happened, Steps):
            self.steps.extend(zip(happened.step, happened.train_loss, happened.lr, happened.grad_norm, strict=True))


@cache
def undisturbed(name: str) -> Undisturbed:
    """Of one of CONFIGS."""
    return train_undisturbed(JobConfig(**CONFIGS[name]))


def train_undisturbed(config: JobConfig, text: str = TEXT, path: str | None = None) -> Undisturbed:
    """Of a config, with nothing but the library. `path`: the way of doing a step, else that of all tests."""
    from nanomoe.tokenizer import load_tokenizer
    from nanomoe.training.loop import train
    from nanomoe.training.run import prepare

    found = Undisturbed({}, {}, [])
    for happened in train(prepare(config, text, load_tokenizer(config.tokenizer), path=path).run):
        found.add(happened)
    return found


def train_stacked(configs: Sequence[JobConfig], text: str = TEXT) -> list[Undisturbed]:
    """Of several configs in one program of stacked weights, on a device that captures work."""
    from nanomoe.tokenizer import load_tokenizer
    from nanomoe.training.cohort import Left, Member, stack, train_together
    from nanomoe.training.loop import Undisturbed as NeverStops
    from nanomoe.training.run import prepare

    runs = [
        prepare(config, text, load_tokenizer(config.tokenizer), path="stacked", width=len(configs), n_threads=1).run
        for config in configs
    ]
    stack(runs, len(runs))
    found = {str(place): Undisturbed({}, {}, []) for place in range(len(runs))}
    for key, happened in train_together([Member(key, run, NeverStops()) for key, run in zip(found, runs, strict=True)]):
        if isinstance(happened, Left):
            assert happened.error is None
        else:
            found[key].add(happened)
    return list(found.values())


def assert_undisturbed(place: Workplace, job: Job, expected: Undisturbed) -> None:
    """Every byte of every checkpoint, every metric and every step."""
    rows = reads.list_checkpoints(place.db, job.id)
    assert [row.percent for row in rows] == [0, 25, 50, 75, 100]
    for row in rows:
        files = {file["name"]: file["sha256"] for file in row.files}
        assert files == expected.files[row.percent], f"at {row.percent} %"
        checkpoint.verify(open_store(place.settings) / row.folder, row.manifest_sha256)
        metrics = {name: value for name, value in row.metrics.items() if name != "tok_per_sec"}
        metrics |= {name: getattr(row, name) for name in LARGE_METRICS}
        assert metrics == dict.fromkeys(LARGE_METRICS) | json.loads(json.dumps(expected.metrics[row.percent]))
    steps = [tuple(row) for row in reads.steps_after(place.db, job.id, 0, 100_000)]
    assert steps == expected.steps


def hooked(
    hooks: dict[int, dict[str, Any]], path: str | None = None, deaths: Mapping[str, Path] | None = None
) -> list[str]:
    """The program of a real trainer with these hooks, by attempt. `path`: its way of doing a step, else that of all
    tests. `deaths`: the files of the next deaths (`next_death.py`), of the `trainer` and of a `fork` of it."""
    chosen: dict[Any, Any] = hooks | {"path": path or os.environ["NANOMOE_STEP_PATH"]}
    chosen["deaths"] = {who: str(file) for who, file in (deaths or {}).items()}
    return [str(HERE / "hooked_trainer.py"), json.dumps(chosen)]
