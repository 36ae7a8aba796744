"""Bias and exact GELU between the two products of an MLP: u = h + bias;  out = u * Phi(u)."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from nanomoe.training.steps.kernels.launching import OPTIONS, n_parts, operator

_BLOCK = 512
_ROOT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
_DENSITY_AT_0: tl.constexpr = tl.constexpr(0.3989422804014327)


@triton.jit(do_not_specialize=["n_columns"])
def _forward(h_NF, bias_F, out_NF, n_columns, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < n_columns
    there = tl.program_id(0).to(tl.int64) * n_columns + f
    u = tl.load(h_NF + there, mask=inside, other=0).to(tl.float32)
    if HAS_BIAS:
        u += tl.load(bias_F + f, mask=inside, other=0)
    out = u * (0.5 + 0.5 * tl.erf(u * _ROOT_HALF))
    tl.store(out_NF + there, out.to(out_NF.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "n_columns"])
def _backward(h_NF, bias_F, d_out_NF, d_h_NF, parts_PF, N, n_columns, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    part = tl.program_id(0)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < n_columns
    stride = n_columns.to(tl.int64)
    bias = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_F + f, mask=inside, other=0)
    d_bias = tl.zeros((BLOCK,), tl.float32)
    for row in range(part, N, tl.num_programs(0)):
        there = row * stride + f
        u = tl.load(h_NF + there, mask=inside, other=0).to(tl.float32) + bias
        slope = 0.5 + 0.5 * tl.erf(u * _ROOT_HALF) + u * _DENSITY_AT_0 * tl.exp(-0.5 * u * u)
        d_u = tl.load(d_out_NF + there, mask=inside, other=0).to(tl.float32) * slope
        tl.store(d_h_NF + there, d_u.to(d_h_NF.dtype.element_ty), mask=inside)
        d_bias += d_u
    tl.store(parts_PF + part * stride + f, d_bias, mask=inside)


@operator("bias_gelu(Tensor h_NF, Tensor? bias_F) -> Tensor")
def _launch_forward(h_NF: Tensor, bias_F: Tensor | None) -> Tensor:
    (N, columns), out_NF = h_NF.shape, torch.empty_like(h_NF)
    _forward[N, triton.cdiv(columns, _BLOCK)](
        h_NF, bias_F, out_NF, columns, HAS_BIAS=bias_F is not None, BLOCK=_BLOCK, **OPTIONS
    )
    return out_NF


@operator("bias_gelu_backward(Tensor h_NF, Tensor? bias_F, Tensor d_out_NF) -> (Tensor, Tensor)")
def _launch_backward(h_NF: Tensor, bias_F: Tensor | None, d_out_NF: Tensor) -> tuple[Tensor, Tensor]:
    (N, columns), d_h_NF = h_NF.shape, torch.empty_like(h_NF)
    parts_PF = h_NF.new_empty(n_parts(N), columns, dtype=torch.float32)
    _backward[len(parts_PF), triton.cdiv(columns, _BLOCK)](
        h_NF, bias_F, d_out_NF, d_h_NF, parts_PF, N, columns, HAS_BIAS=bias_F is not None, BLOCK=_BLOCK, **OPTIONS
    )
    return d_h_NF, parts_PF


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_NF: Tensor, bias_F: Tensor | None) -> Tensor:
        ctx.save_for_backward(h_NF, bias_F)
        out_NF: Tensor = _launch_forward(h_NF, bias_F)
        return out_NF

    @staticmethod
    def backward(ctx: Any, d_out_NF: Tensor) -> tuple[Tensor, Tensor | None]:
        h_NF, bias_F = ctx.saved_tensors
        d_h_NF, parts_PF = _launch_backward(h_NF, bias_F, d_out_NF.contiguous())
        return d_h_NF, None if bias_F is None else parts_PF.sum(0)


def bias_gelu(h_NF: Tensor, bias_F: Tensor | None) -> Tensor:
    """In the type of `h_NF`, a product without its bias; the bias is float32."""
    out_NF: Tensor = _BiasGelu.apply(h_NF, bias_F)
    return out_NF


def reference(h_NF: Tensor, bias_F: Tensor | None) -> Tensor:
    """The same by torch."""
    return F.gelu(h_NF.float() if bias_F is None else h_NF.float() + bias_F).to(h_NF.dtype)
