"""The residual stream: add what a branch gives, some of its channels dropped, and normalise the sum for the next.

x' = x + mask * (y + bias);  normed = (x' - mean(x')) / sqrt(var(x') + 1e-5) * weight + norm_bias
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from nanomoe.training.steps.kernels.launching import OPTIONS, n_parts, operator, power_of_two
from nanomoe.training.steps.kernels.masks import kept, load_key

_EPS: tl.constexpr = tl.constexpr(1e-5)


@triton.jit(do_not_specialize=["T", "C", "planes", "cut", "scale"], do_not_specialize_on_alignment=["words"])
def _forward(
    x_NC, y_NC, bias_C, words, weight_C, norm_bias_C, sum_NC, normed_NC, mean_N, rstd_N, T, C, planes, cut, scale,
    HAS_X: tl.constexpr, HAS_BIAS: tl.constexpr, DROPS: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    inside = c < C
    there = row.to(tl.int64) * C + c
    x = tl.load(y_NC + there, mask=inside, other=0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_C + c, mask=inside, other=0)
    if DROPS:
        low, high = load_key(words, row // T * planes)
        x *= kept(low, high, tl.zeros_like(c) + row % T, c, cut, scale)
    if HAS_X:
        x += tl.load(x_NC + there, mask=inside, other=0)
    tl.store(sum_NC + there, x, mask=inside)
    mean = tl.sum(tl.where(inside, x, 0.0), 0) / C
    off = tl.where(inside, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(off * off, 0) / C + _EPS)
    tl.store(mean_N + row, mean)
    tl.store(rstd_N + row, rstd)
    normed = off * rstd * tl.load(weight_C + c, mask=inside, other=0)
    if HAS_NORM_BIAS:
        normed += tl.load(norm_bias_C + c, mask=inside, other=0)
    tl.store(normed_NC + there, normed.to(normed_NC.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "T", "C", "planes", "cut", "scale"], do_not_specialize_on_alignment=["words"])
def _backward(
    d_sum_NC, d_normed_NC, sum_NC, mean_N, rstd_N, weight_C, words, d_x_NC, d_y_NC, parts_P3C, N, T, C, planes, cut,
    scale, HAS_D_SUM: tl.constexpr, DROPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    inside = c < C
    weight = tl.load(weight_C + c, mask=inside, other=0)
    d_weight, d_norm_bias, d_bias = tl.zeros_like(weight), tl.zeros_like(weight), tl.zeros_like(weight)
    stride = C.to(tl.int64)
    for row in range(part, N, tl.num_programs(0)):
        there = row * stride + c
        d_normed = tl.load(d_normed_NC + there, mask=inside, other=0).to(tl.float32)
        rstd = tl.load(rstd_N + row)
        x_hat = tl.where(inside, (tl.load(sum_NC + there, mask=inside, other=0) - tl.load(mean_N + row)) * rstd, 0.0)
        d_weight += d_normed * x_hat
        d_norm_bias += d_normed
        d_hat = d_normed * weight
        d_x = (d_hat - x_hat * (tl.sum(d_hat * x_hat, 0) / C) - tl.sum(d_hat, 0) / C) * rstd
        if HAS_D_SUM:
            d_x += tl.load(d_sum_NC + there, mask=inside, other=0)
        tl.store(d_x_NC + there, d_x, mask=inside)
        if DROPS:
            low, high = load_key(words, row // T * planes)
            d_x *= kept(low, high, tl.zeros_like(c) + row % T, c, cut, scale)
        tl.store(d_y_NC + there, d_x.to(d_y_NC.dtype.element_ty), mask=inside)
        d_bias += d_x
    sums = parts_P3C + part.to(tl.int64) * 3 * C + c
    tl.store(sums, d_weight, mask=inside)
    tl.store(sums + C, d_norm_bias, mask=inside)
    tl.store(sums + 2 * C, tl.where(inside, d_bias, 0.0), mask=inside)


@operator(
    "add_branch(Tensor? x_NC, Tensor y_NC, Tensor? bias_C, Tensor? words_BP2, Tensor weight_C, Tensor? norm_bias_C, "
    "int T, int cut, float scale, ScalarType out) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _launch_forward(
    x_NC: Tensor | None, y_NC: Tensor, bias_C: Tensor | None, words_BP2: Tensor | None, weight_C: Tensor,
    norm_bias_C: Tensor | None, T: int, cut: int, scale: float, out: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    N, C = y_NC.shape
    sum_NC, normed_NC = (y_NC.new_empty(N, C, dtype=dtype) for dtype in (torch.float32, out))
    mean_N, rstd_N = (sum_NC.new_empty(N) for _ in range(2))
    planes = 1 if words_BP2 is None else words_BP2.shape[1]
    _forward[(N,)](
        x_NC, y_NC, bias_C, words_BP2, weight_C, norm_bias_C, sum_NC, normed_NC, mean_N, rstd_N, T, C, planes, cut,
        scale, HAS_X=x_NC is not None, HAS_BIAS=bias_C is not None, DROPS=words_BP2 is not None,
        HAS_NORM_BIAS=norm_bias_C is not None, BLOCK=power_of_two(C), **OPTIONS,
    )  # fmt: skip
    return sum_NC, normed_NC, mean_N, rstd_N


@operator(
    "add_branch_backward(Tensor? d_sum_NC, Tensor d_normed_NC, Tensor sum_NC, Tensor mean_N, Tensor rstd_N, "
    "Tensor weight_C, Tensor? words_BP2, int T, int cut, float scale, ScalarType of_y) -> (Tensor, Tensor, Tensor)"
)
def _launch_backward(
    d_sum_NC: Tensor | None, d_normed_NC: Tensor, sum_NC: Tensor, mean_N: Tensor, rstd_N: Tensor, weight_C: Tensor,
    words_BP2: Tensor | None, T: int, cut: int, scale: float, of_y: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    N, C = sum_NC.shape
    d_x_NC, d_y_NC = torch.empty_like(sum_NC), torch.empty_like(sum_NC, dtype=of_y)
    parts_P3C = sum_NC.new_empty(n_parts(N), 3, C)
    planes = 1 if words_BP2 is None else words_BP2.shape[1]
    _backward[(len(parts_P3C),)](
        d_sum_NC, d_normed_NC, sum_NC, mean_N, rstd_N, weight_C, words_BP2, d_x_NC, d_y_NC, parts_P3C, N, T, C, planes,
        cut, scale, HAS_D_SUM=d_sum_NC is not None, DROPS=words_BP2 is not None, BLOCK=power_of_two(C), **OPTIONS,
    )  # fmt: skip
    return d_x_NC, d_y_NC, parts_P3C


class _AddBranch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NC: Tensor | None, y_NC: Tensor, bias_C: Tensor | None, words_BP2: Tensor | None,
        weight_C: Tensor, norm_bias_C: Tensor | None, T: int, cut: int, scale: float, out: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        sum_NC, normed_NC, *moments = _launch_forward(
            x_NC, y_NC.contiguous(), bias_C, words_BP2, weight_C, norm_bias_C, T, cut, scale, out
        )
        ctx.save_for_backward(sum_NC, *moments, weight_C, words_BP2)
        ctx.rest = T, cut, scale, y_NC.dtype
        ctx.has = x_NC is not None, bias_C is not None, norm_bias_C is not None
        ctx.set_materialize_grads(False)
        return sum_NC, normed_NC

    @staticmethod
    def backward(ctx: Any, d_sum_NC: Tensor | None, d_normed_NC: Tensor) -> tuple[Tensor | None, ...]:
        has_x, has_bias, has_norm_bias = ctx.has
        d_x_NC, d_y_NC, parts_P3C = _launch_backward(d_sum_NC, d_normed_NC.contiguous(), *ctx.saved_tensors, *ctx.rest)
        d_weight_C, d_norm_bias_C, d_bias_C = parts_P3C.sum(0)
        return (
            d_x_NC if has_x else None, d_y_NC, d_bias_C if has_bias else None, None, d_weight_C,
            d_norm_bias_C if has_norm_bias else None, None, None, None, None,
        )  # fmt: skip


def add_branch(
    x_NC: Tensor | None, y_NC: Tensor, bias_C: Tensor | None, words_BP2: Tensor | None, weight_C: Tensor,
    norm_bias_C: Tensor | None, *, T: int, cut: int, scale: float, out: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum, float32, and its normalised form, in the type `out`.

    Args:
        x_NC: the stream so far, float32; None where it begins here.
        y_NC: the branch's product, in any type.
        bias_C: the product's bias, float32.
        words_BP2: `words_of` the mask's first plane; None drops nothing.
        weight_C, norm_bias_C: the norm's, float32.
        T: tokens of a window.
        cut, scale: of the dropout, as `nanomoe.model.dropout` has them.
    """
    sum_NC, normed_NC = _AddBranch.apply(x_NC, y_NC, bias_C, words_BP2, weight_C, norm_bias_C, T, cut, scale, out)
    return sum_NC, normed_NC


def reference(
    x_NC: Tensor | None, y_NC: Tensor, bias_C: Tensor | None, mask_NC: Tensor | None, weight_C: Tensor,
    norm_bias_C: Tensor | None, out: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same with a ready mask."""
    y = y_NC.float() if bias_C is None else y_NC.float() + bias_C
    y = y if mask_NC is None else y * mask_NC
    sum_NC = y if x_NC is None else x_NC + y
    return sum_NC, F.layer_norm(sum_NC, weight_C.shape, weight_C, norm_bias_C, 1e-5).to(out)
