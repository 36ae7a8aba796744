"""When a job has kernels, and that all of them compile for a GPU, which takes no GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanomoe.config import JobConfig
from nanomoe.training.execution import Execution
from nanomoe.training.steps import choice
from nanomoe.training.steps.kernels import compiling
from nanomoe.training.steps.kernels.__main__ import compile_kernels
from nanomoe.training.steps.kernels.compiling import KernelCompiler, KernelVariant
from tests.nanomoe.training.steps.graphs_stand_in import RecordedGraphs

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NANOMOE_STEP_PATH")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiling, "not_installed_because", lambda: None)
    monkeypatch.setattr(choice, "not_installed_because", lambda: None)


def variant(length: int = 87, **config: object) -> KernelVariant:
    return KernelVariant(JobConfig.model_validate(config), length, torch.bfloat16, "a GPU")


def test_a_job_has_kernels_once_they_are_compiled_for_models_like_its_own() -> None:
    path, reason = choice.choose_path(GPU, None, variant())
    assert (path, "not compiled" in reason) == ("captured", True)
    variant().mark_compiled()
    assert choice.choose_path(GPU, None, variant())[0] == "triton"
    assert choice.choose_path(GPU, None, variant(epochs=7, n_layer=8, lr=1e-3))[0] == "triton"
    for other in (variant(n_embd=64), variant(length=300), variant(dropout=0.0), variant(use_moe=True)):
        assert choice.choose_path(GPU, None, other)[0] == "captured"
    assert variant(n_experts=4).mark == variant().mark != variant(use_moe=True).mark
    assert variant(use_moe=True, n_experts=4).mark != variant(use_moe=True).mark


def test_without_triton_a_step_is_captured_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    variant().mark_compiled()
    for module in (choice, compiling):
        monkeypatch.setattr(module, "not_installed_because", lambda: "Triton is not installed")
    assert choice.choose_path(GPU, "triton") == ("captured", "Triton is not installed")
    path, reason = choice.choose_path(GPU, None, variant())
    assert (path, "Triton is not installed" in reason) == ("captured", True)
    assert choice.choose_path(torch.device("cpu"), "triton")[0] == "eager"


def test_a_job_that_began_without_kernels_stays_so_and_one_that_has_them_says_when_they_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(choice.CAPTURING, "cpu", RecordedGraphs)
    captured, triton = (
        Execution.decide(JobConfig(use_moe=True), "cpu", n_tokens=87, path=path)  # type: ignore[arg-type]
        for path in ("captured", "triton")
    )
    assert captured.compiled_for is None
    assert triton.compiled_for is not None
    assert "kernels" in triton.compiled_for
    assert triton.keeping(captured) == captured
    assert triton.differences(triton.keeping(triton)) == []
    assert triton.differences(captured.keeping(triton))[0] == "path: triton -> captured"
    changed = triton.model_copy(update={"compiled_for": "triton 3.9.0, kernels of yesterday"})
    assert [said.partition(":")[0] for said in changed.differences(triton.keeping(changed))] == ["compiled_for"]


def test_kernels_are_compiled_beside_the_jobs_one_variant_at_a_time_and_each_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    wait = f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)"
    monkeypatch.setattr(KernelVariant, "command", lambda self, device: [sys.executable, "-c", wait])
    compiler = KernelCompiler()
    assert compiler.start(variant(), "cuda")
    assert not compiler.start(variant(n_embd=64), "cuda"), "a process is at it"
    gate.touch()
    assert compiler._process is not None
    assert compiler._process.wait(60) == 0
    assert not compiler.start(variant(), "cuda"), "that was tried"
    assert compiler.start(variant(n_embd=64), "cuda")
    assert compiler._process.wait(60) == 0


@pytest.mark.triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_the_compiling_process_marks_what_it_has_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(choice.CAPTURING, "cpu", RecordedGraphs)
    config = JobConfig(n_layer=3, n_embd=16, n_head=2, batch_size=5, precision="float32")
    beside = KernelVariant(config, 3, torch.float32, "cpu")
    assert beside.not_compiled_because() is not None
    command = beside.command("cpu")
    device, length, dtype, given = command[4:]
    compile_kernels(JobConfig.model_validate_json(given), device, int(length), dtype)
    assert beside.not_compiled_because() is None


_COMPILE = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Driver:
    get_current_device = get_current_stream = lambda self, device=None: 0
    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)

class Graphs:
    replay = lambda self: None
    limit_lead = lambda self: None
    def capture(self, work, unchanged=(), *, is_warm=False):
        work()
        return self

compiled = set()
launch = JITFunction.run
def compile_only(self, *args, grid, warmup, **options):
    kernel = launch(self, *args, grid=grid, warmup=True, **options)
    assert kernel.metadata.shared <= 64 * 1024, (self.__name__, kernel.metadata.shared)
    compiled.add((self.__module__.rpartition(".")[2], self.__name__))

driver.set_active(Driver())
JITFunction.run = compile_only
torch.Tensor.new_empty, torch.empty_like = torch.Tensor.new_zeros, torch.zeros_like  # nothing fills them

from nanomoe.config import JobConfig
from nanomoe.tokenizer import load_tokenizer
from nanomoe.training.execution import Execution
from nanomoe.training.run import Run
from nanomoe.training.steps import choice

choice.CAPTURING["cpu"] = lambda device: Graphs()
config = JobConfig(tokenizer="bytes", n_layer=2, use_moe=True, precision=sys.argv[2])
execution = Execution.decide(config, "cpu", n_tokens=87, path="triton")
assert execution.path == "triton", execution.path_reason
tokenizer = load_tokenizer("bytes")
run = Run(config, tokenizer.encode("x" * 87), tokenizer, execution, device=torch.device("cpu"))
for moe in run.model.moe_layers.values():
    moe.path = "masked"
run.train_step()
print(len(compiled))
"""


@pytest.mark.triton
@pytest.mark.parametrize(("capability", "precision"), [(80, "bfloat16"), (90, "float32")])
def test_every_kernel_compiles_for_a_gpu(capability: int, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code, by the code path of a job's first step, with the argument types of the reference model and of a
    mixture; and none takes more shared memory than an older GPU has."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [sys.executable, "-W", "error", "-c", _COMPILE, str(capability), precision]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "16\n", done.stderr
