"""The program's own ways of doing a training step, each built as a job's run is built."""

import os
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from nanomoe.bench.training.contender import Contender, NotMeasured, text_loss
from nanomoe.bench.training.shapes import Shape
from nanomoe.model.moe import Assignments, ExpertPath, Experts
from nanomoe.training.execution import Execution
from nanomoe.training.run import Run, prepare

WAYS = ("eager", "fused", "captured", "triton")
"""All that there may be: operator by operator, written out in compiled loops, captured as CUDA graphs, captured with
kernels of our own."""

_FORCED = "NANOMOE_STEP_PATH"
"""Environment variable that names the way which jobs take."""


def precisions(device: torch.device, way: str) -> tuple[str, ...]:
    """The types of products that a way is measured with: on a GPU bfloat16, the default there; on a CPU float32, and
    for the fused way bfloat16 where the processor has such products."""
    if device.type == "cuda":
        return ("bfloat16",)
    if way == "fused" and torch.cpu._is_avx512_bf16_supported():
        return ("float32", "bfloat16")
    return ("float32",)


def prepare_run(shape: Shape, way: str, precision: str, device: torch.device) -> tuple[Run, Execution]:
    """A run of the shape whose steps are done in this way.

    Raises:
        NotMeasured: this version has no such way, or it does not cover the shape.
    """
    if way not in get_args(Execution.model_fields["path"].annotation):
        raise NotMeasured("this version has no such way of doing a step")
    config = shape.config.model_copy(update={"precision": precision})
    tokenizer = shape.tokenizer()
    with _forced(way):
        prepared = prepare(config, shape.text(tokenizer), tokenizer, device=str(device))
    if prepared.execution.path != way:
        raise NotMeasured(str(prepared.execution.model_dump().get("path_reason") or "it does not cover the shape"))
    windows = prepared.run.windows
    assert (windows.count, windows.length) == (shape.n_windows, shape.length), "the text has the shape's windows"
    return prepared.run, prepared.execution


def contender(shape: Shape, way: str, precision: str, device: torch.device) -> Contender:
    """The shape's steps, done in this way.

    Raises:
        NotMeasured: this version has no such way, or it does not cover the shape.
    """
    return _contender(*prepare_run(shape, way, precision, device))


def loop_over_experts(shape: Shape, device: torch.device) -> Contender:
    """The eager steps of a mixture, but one expert after another on the tokens that chose it, as most published code
    has it.

    Raises:
        NotMeasured: the shape has no mixture.
    """
    if not shape.config.use_moe:
        raise NotMeasured("the shape has no mixture of experts")
    run, execution = prepare_run(shape, "eager", precisions(device, "eager")[0], device)
    for moe in run.model.moe_layers.values():
        moe.experts.forward = types.MethodType(_one_after_another, moe.experts)  # type: ignore[method-assign]
    return _contender(run, execution)


def _contender(run: Run, execution: Execution) -> Contender:
    def logits_of(inputs_BT: Tensor) -> Tensor:
        run.model.eval()
        return run.model(inputs_BT).logits_BTV  # type: ignore[no-any-return]

    def loss() -> float:
        return text_loss(logits_of, run.windows, run.config.batch_size)

    return Contender(run.train_step, loss, run.model, execution.precision, execution.n_threads)


def _one_after_another(self: Experts, x_TC: Tensor, assignments: Assignments, _: ExpertPath) -> Tensor:
    dtype = torch.get_autocast_dtype(x_TC.device.type) if torch.is_autocast_enabled(x_TC.device.type) else x_TC.dtype
    out_TKC = x_TC.new_zeros(*assignments.chosen_TK.shape, x_TC.shape[1], dtype=dtype)
    for expert in range(len(self.w_in)):
        token, choice = (assignments.chosen_TK == expert).nonzero(as_tuple=True)
        hidden = x_TC[token] @ self.w_in[expert]
        hidden = hidden if self.b_in is None else hidden + self.b_in[expert]
        out = F.gelu(hidden) @ self.w_out[expert]
        out = out if self.b_out is None else out + self.b_out[expert]
        out_TKC = out_TKC.index_put((token, choice), out.to(dtype))
    return out_TKC


@contextmanager
def _forced(way: str) -> Iterator[None]:
    """Within it, jobs take this way where it covers them."""
    before = os.environ.get(_FORCED)
    os.environ[_FORCED] = way
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCED]
        else:
            os.environ[_FORCED] = before


def contenders(shape: Shape, device: torch.device) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """All of the program's own ways for a shape by name; building one raises `NotMeasured` where it cannot be done."""
    for way in WAYS:
        for precision in precisions(device, way):
            name = way if precision == "float32" or device.type == "cuda" else f"{way} {precision}"
            yield name, lambda way=way, precision=precision: contender(shape, way, precision, device)  # type: ignore[misc]
