"""Jobs whose peak of memory is measured against its prediction, each in a process of its own.

`python -m tests.nanomoe.training.peaks [NAME ...]` measures them all, or those, in some minutes; the tests measure a
few. Linux only: the peak is read from /proc.
"""

import ctypes
import gc
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanomoe.bench.models import tokenizer_of
from nanomoe.bench.training.shapes import text_of
from nanomoe.config import JobConfig
from nanomoe.model.size import Way, training_bytes
from nanomoe.tokenizer import Tokenizer, load_tokenizer
from nanomoe.training.execution import Execution
from nanomoe.training.loop import train
from nanomoe.training.run import Run
from tests.forks import FORKS


class Shape(NamedTuple):
    """A job whose text is one batch."""

    vocab_size: int
    windows: int
    length: int
    changes: dict[str, Any]

    def config(self) -> JobConfig:
        """Its config: the second step has the optimizer's state too."""
        fixed = {"cont_max_new_tokens": 0, "max_steps": 2, "tokenizer": "bytes"}
        return JobConfig.model_validate(fixed | {"batch_size": self.windows, "block_size": self.length} | self.changes)


class Measured(NamedTuple):
    """Bytes of a whole job at its peak, beside what the process had before it."""

    taken: int
    predicted: int


_MIXTURE = {"use_moe": True, "n_experts": 8, "k": 2}

SHAPES = {
    "dense": Shape(8192, 1, 87, {}),
    "dense-50k": Shape(50257, 1, 87, {}),
    "dense-bytes": Shape(256, 12, 64, {}),
    "dense-wide": Shape(256, 8, 256, {"n_embd": 256, "n_layer": 2}),
    "dense-no-dropout": Shape(8192, 12, 64, {"dropout": 0.0, "n_embd": 256}),
    "mixture": Shape(8192, 1, 87, _MIXTURE),
    "mixture-bytes": Shape(256, 12, 64, _MIXTURE),
    "mixture-long": Shape(256, 8, 256, _MIXTURE),
    "mixture-many-experts": Shape(256, 8, 256, _MIXTURE | {"n_experts": 32, "k": 4, "expert_hidden_ratio": 1.0}),
    "mixture-shared": Shape(256, 4, 256, _MIXTURE | {"n_layer": 2, "n_embd": 192, "n_shared_experts": 1}),
    "mixture-capacity": Shape(
        256, 8, 256, _MIXTURE | {"n_experts": 4, "k": 1, "capacity_factor": 1.25, "n_embd": 256, "n_layer": 2}
    ),
    "mixture-50k": Shape(50257, 12, 64, _MIXTURE | {"n_experts": 16, "n_embd": 64}),
    "mixture-noise": Shape(8192, 8, 256, _MIXTURE | {"router_noise": True, "n_embd": 192, "n_layer": 2}),
    "mixture-no-dropout": Shape(
        256, 8, 256, _MIXTURE | {"moe_stride": 1, "dropout": 0.0, "n_embd": 192, "n_layer": 3}
    ),
    "mixture-all-chosen": Shape(256, 12, 64, _MIXTURE | {"n_experts": 4, "k": 4, "n_embd": 256}),
}  # fmt: skip
"""By name: those that the prediction's constants were chosen on."""

HELD_OUT = {
    "held-out-deep": Shape(
        8192, 4, 128, _MIXTURE | {"n_experts": 16, "k": 3, "n_embd": 96, "n_layer": 6, "dropout": 0.1}
    ),
    "held-out-stride": Shape(
        256, 16, 64, _MIXTURE
        | {"n_experts": 4, "k": 1, "capacity_factor": 1.0, "moe_stride": 1, "n_shared_experts": 2},
    ),
    "held-out-50k": Shape(50257, 2, 100, _MIXTURE),
}  # fmt: skip
"""By name: those that nobody looked at while the constants were chosen."""


def measured(shape: Shape, way: Way) -> Measured:
    """Measure the job in a process of its own: one that has run others has memory to give out again."""
    with ProcessPoolExecutor(1, FORKS) as process:
        return process.submit(_measured_here, shape, way).result()


def _measured_here(shape: Shape, way: Way) -> Measured:
    torch.set_num_threads(1)
    config = shape.config()
    tokenizer = load_tokenizer("bytes") if shape.vocab_size == 256 else tokenizer_of(shape.vocab_size)
    n_tokens = shape.windows * shape.length + (shape.windows > 1)
    tokens = tokenizer.encode(text_of(tokenizer, n_tokens))
    # Much of torch is loaded when it is first used.
    kind = config.model_dump(include={"use_moe"})
    small = JobConfig.model_validate({"max_steps": 1, "n_layer": 2, "n_embd": 32, "cont_max_new_tokens": 0} | kind)
    _train(small, tokens[:64], tokenizer, way)
    before = _reset_peak()
    _train(config, tokens, tokenizer, way)
    return Measured(_of_process("VmHWM") - before, training_bytes(config, tokenizer.vocab_size, len(tokens), way=way))


def _train(config: JobConfig, tokens: list[int], tokenizer: Tokenizer, way: Way) -> None:
    how = Execution.decide(config, "cpu", n_tokens=len(tokens), path=way)
    assert how.path == way, how.path_reason
    for _ in train(Run(config, tokens, tokenizer, how, device=torch.device("cpu"))):
        pass


def _reset_peak() -> int:
    """Bytes that the process has now, from where its peak is counted anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _of_process("VmRSS")


def _of_process(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    shapes = SHAPES | HELD_OUT
    ways: tuple[Way, ...] = ("fused", "eager")
    for name in sys.argv[1:] or shapes:
        for way in ways:
            taken, predicted = measured(shapes[name], way)
            figures = f"{taken / 2**20:7.1f} MiB, predicted {predicted / 2**20:7.1f}: {predicted / taken:.2f}"
            print(f"{name:20} {way:6} {figures}", flush=True)
