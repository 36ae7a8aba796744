import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanomoe.config import JobConfig
from nanomoe.training.execution import Execution
from nanomoe.training.steps import choice, threads
from nanomoe.training.steps.loops import compiling

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOMOE_STEP_PATH")


@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiling.LOOPS, "folder", tmp_path / "loops")


def test_a_job_whose_loops_are_not_compiled_does_its_steps_without_them_and_says_why(not_compiled: None) -> None:
    path, reason = choice.choose_path(CPU)
    assert (path, "not compiled" in reason) == ("eager", True)
    execution = Execution.decide(JobConfig(), "cpu", n_tokens=87)
    assert (execution.path, execution.path_reason, execution.compiled_for) == ("eager", reason, None)
    compiling.LOOPS.mark_compiled()
    execution = Execution.decide(JobConfig(), "cpu", n_tokens=87)
    assert execution.path == "fused"
    assert execution.compiled_for is not None
    assert "numba" in execution.compiled_for


def test_what_a_device_does_not_have_is_done_eagerly_even_if_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice.choose_path(torch.device("cuda"), "fused")[0] == "eager"
    monkeypatch.setenv("NANOMOE_STEP_PATH", "fused")
    assert choice.choose_path(CPU)[0] == "fused"
    monkeypatch.setenv("NANOMOE_STEP_PATH", "fast")
    with pytest.raises(ValueError, match="eager or fused"):
        choice.choose_path(CPU)


def test_on_a_gpu_a_step_is_captured_unless_another_way_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    assert choice.choose_path(gpu)[0] == "captured"
    assert choice.choose_path(gpu, "eager") == ("eager", "asked for")
    assert choice.choose_path(CPU, "captured") == ("eager", "only a GPU has graphs of captured work")
    monkeypatch.setenv("NANOMOE_STEP_PATH", "eager")
    assert choice.choose_path(gpu)[0] == "eager"
    assert choice.choose_path(gpu, "captured")[0] == "captured"


def test_a_later_attempt_keeps_the_way_of_the_first_and_says_when_it_cannot() -> None:
    eager, fused = (Execution.decide(JobConfig(), "cpu", n_tokens=87, path=path) for path in ("eager", "fused"))  # type: ignore[arg-type]
    assert fused.keeping(eager) == eager
    assert fused.keeping(fused) == fused
    assert eager.differences(eager.keeping(fused)) == []
    said = fused.differences(eager.keeping(fused))
    assert said[0] == "path: fused -> eager"


def test_only_an_eager_step_has_a_path_of_its_own_for_experts() -> None:
    config = JobConfig(use_moe=True)
    eager, fused = (Execution.decide(config, "cpu", n_tokens=87, path=path) for path in ("eager", "fused"))  # type: ignore[arg-type]
    assert (eager.expert_path, fused.expert_path, fused.expert_path_reason) == ("padded", None, None)
    for now in (eager, fused):
        assert now.keeping(eager) == eager
    assert fused.keeping(fused) == fused
    said = fused.differences(eager.keeping(fused))
    assert [said[0], said[-1]] == ["path: fused -> eager", "expert_path: None -> padded"]


def test_a_job_that_began_under_other_arithmetic_goes_on_and_says_so() -> None:
    now = Execution.decide(JobConfig(), "cpu", n_tokens=87, path="eager")
    stored = now.model_dump(mode="json")
    for name in ("numerics", "path_reason", "compiled_for"):
        del stored[name]
    first = Execution.recorded(stored, JobConfig())
    assert first.numerics == 0
    assert first.differences(now.keeping(first)) == [f"numerics: 0 -> {now.numerics}"]


def test_the_number_of_threads_is_measured_once_for_a_shape_and_kept(
    not_compiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def measure(config: JobConfig, vocab_size: int, windows: int, length: int, dtype: torch.dtype, most: int) -> int:
        measured.append(windows * length)
        return most

    def threads_of(n_tokens: int, most: int) -> int:
        return threads.measured_threads(JobConfig(), 8192, n_tokens, torch.float32, most)

    real = threads._measure
    monkeypatch.setattr(threads, "_measure", measure)
    assert [threads_of(87, 2), threads_of(87, 2), threads_of(50, 2), threads_of(87, 1)] == [2, 2, 2, 1]
    assert [threads_of(20, 2), threads_of(2, 2)] == [1, 1]  # too little to share out
    assert measured == [87, 50]
    before = torch.get_num_threads()
    assert real(JobConfig(n_embd=16, n_layer=1), 256, 2, 20, torch.float32, 3) in (1, 2, 3)
    assert torch.get_num_threads() == before


def test_all_loops_are_compiled_by_one_call_and_nothing_is_left_to_compile() -> None:
    """In an interpreter of its own: afterwards a step of another shape and either type compiles nothing."""
    script = """
import numba, torch
from numba.core.dispatcher import Dispatcher
from nanomoe.config import JobConfig
from nanomoe.training.run import prepare
from nanomoe.training.steps.loading import load_all
from nanomoe.training.steps.loops import backward, expert_rows, forward, keys, routing, update
from nanomoe.tokenizer import load_tokenizer

def signatures():
    modules = (backward, expert_rows, forward, keys, routing, update)
    loops = [loop for module in modules for loop in vars(module).values() if isinstance(loop, Dispatcher)]
    return {loop.__name__: len(loop.signatures) for loop in loops}

load_all()
before = signatures()
assert before["cross_entropy"] == before["adamw"] == 2, before
for precision in ("float32", "bfloat16"):
    for more in (
        {},
        {"gradient_accumulation_steps": 2, "grad_clip": 0.1, "bias": False, "dropout": 0.0},
        {"use_moe": True, "n_shared_experts": 1, "capacity_factor": 1.0, "router_bias_update_rate": 0.1},
        {"use_moe": True, "bias": False, "router_score": "sigmoid", "router_noise": True},
    ):
        config = JobConfig.model_validate(
            {"tokenizer": "bytes", "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 8, "batch_size": 2,
             "precision": precision, **more})
        run = prepare(config, "uma frase bem longa, e mais outra ainda", load_tokenizer("bytes"), path="fused").run
        run.train_step()
assert signatures() == before, (before, signatures())
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
