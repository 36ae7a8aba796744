"""Causal attention whose weights are dropped by the hash, block by block: no matrix of weights is kept.

    P = softmax(Q K^T / sqrt(D));  out = (P * mask) V

The sums of the softmax go over the weights before they are dropped. The backward pass computes P again from each row's
logarithm of that sum (Dao and others, arXiv 2205.14135), and with delta = rowsum(d_out * out), which is also
rowsum(P * dP) with the mask in dP:

    dV = (P * mask)^T d_out;  dP = (d_out V^T) * mask;  dS = P * (dP - delta) / sqrt(D);  dQ = dS K;  dK = dS^T Q
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanomoe.training.steps.kernels.launching import OPTIONS, operator, power_of_two
from nanomoe.training.steps.kernels.masks import kept, load_key

_FEW, _MANY = 32, 64
"""Queries of a block where windows are short and where they are long. Assumed."""

_IS_INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)

_RUNTIME = ["T", "H", "C", "D", "planes", "factor", "cut", "scale"]


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """The matrix product, summed up in float32. Triton's interpreter multiplies the bits of a bfloat16, so there the
    factors are widened, which changes no number."""
    if _IS_INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _weights(queries, keys, lse, rows, columns, factor, T, PRECISION: tl.constexpr):
    """The weights of a block of queries, given the logarithm of each one's sum."""
    scores = product(queries, tl.trans(keys), PRECISION) * factor
    seen = (rows[:, None] >= columns[None, :]) & (rows[:, None] < T)
    return tl.exp(tl.where(seen, scores - lse[:, None], float("-inf")))


@triton.jit
def _place(T, H, D, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where a program is: its head among those of all windows, window, head, positions (BLOCK_T), channels of the head
    (BLOCK_D), and which pairs of the two exist."""
    head = tl.program_id(1)
    positions = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    return head, head // H, head % H, positions, d, (positions[:, None] < T) & (d[None, :] < D)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=["words"])
def _forward(
    triple, words, out, lse, T, H, C, D, planes, factor, cut, scale, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head, b, h, rows, d, is_there = _place(T, H, D, BLOCK_T, BLOCK_D)
    stride = C.to(tl.int64)
    of_head = triple + b * T * 3 * stride + h * D + d[None, :]
    queries = tl.load(of_head + rows[:, None] * 3 * stride, mask=is_there, other=0)
    low, high = load_key(words, b * planes + h)
    most = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    sums = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in range(0, tl.minimum((tl.program_id(0) + 1) * BLOCK_T, T), BLOCK_T):
        columns = first + tl.arange(0, BLOCK_T)
        within = (columns[:, None] < T) & (d[None, :] < D)
        there = of_head + columns[:, None] * 3 * stride
        keys = tl.load(there + C, mask=within, other=0)
        values = tl.load(there + 2 * C, mask=within, other=0)
        scores = product(queries, tl.trans(keys), PRECISION) * factor
        scores = tl.where(rows[:, None] >= columns[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrunk = tl.exp(most - higher)
        total = total * shrunk + tl.sum(weights, 1)
        weights *= kept(low, high, rows[:, None], columns[None, :], cut, scale)
        added = product(weights.to(values.dtype), values, PRECISION)
        sums = sums * shrunk[:, None] + added
        most = higher
    to = out + b * T * stride + h * D + rows[:, None] * stride + d[None, :]
    tl.store(to, (sums / total[:, None]).to(out.dtype.element_ty), mask=is_there)
    tl.store(lse + head * T + rows, most + tl.log(total), mask=rows < T)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=["words"])
def _backward_queries(
    triple, words, out, lse, d_out, d_triple, delta, T, H, C, D, planes, factor, cut, scale, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The queries' gradient, and each row's delta."""
    head, b, h, rows, d, is_there = _place(T, H, D, BLOCK_T, BLOCK_D)
    stride = C.to(tl.int64)
    offset = b * T * 3 * stride + h * D + d[None, :]
    at_rows = b * T * stride + h * D + rows[:, None] * stride + d[None, :]
    queries = tl.load(triple + offset + rows[:, None] * 3 * stride, mask=is_there, other=0)
    d_rows = tl.load(d_out + at_rows, mask=is_there, other=0)
    delta_rows = tl.sum(d_rows.to(tl.float32) * tl.load(out + at_rows, mask=is_there, other=0).to(tl.float32), 1)
    tl.store(delta + head * T + rows, delta_rows, mask=rows < T)
    lse_rows = tl.load(lse + head * T + rows, mask=rows < T, other=0)
    low, high = load_key(words, b * planes + h)
    d_queries = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in range(0, tl.minimum((tl.program_id(0) + 1) * BLOCK_T, T), BLOCK_T):
        columns = first + tl.arange(0, BLOCK_T)
        within = (columns[:, None] < T) & (d[None, :] < D)
        there = triple + offset + columns[:, None] * 3 * stride
        keys = tl.load(there + C, mask=within, other=0)
        values = tl.load(there + 2 * C, mask=within, other=0)
        weights = _weights(queries, keys, lse_rows, rows, columns, factor, T, PRECISION)
        d_weights = product(d_rows, tl.trans(values), PRECISION)
        d_weights *= kept(low, high, rows[:, None], columns[None, :], cut, scale)
        d_scores = (weights * (d_weights - delta_rows[:, None])).to(keys.dtype)
        d_queries += product(d_scores, keys, PRECISION)
    to = d_triple + offset + rows[:, None] * 3 * stride
    tl.store(to, (d_queries * factor).to(d_triple.dtype.element_ty), mask=is_there)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=["words"])
def _backward_keys(
    triple, words, lse, d_out, d_triple, delta, T, H, C, D, planes, factor, cut, scale, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values, with the deltas that the queries' kernel has left."""
    head, b, h, columns, d, is_there = _place(T, H, D, BLOCK_T, BLOCK_D)
    stride = C.to(tl.int64)
    offset = b * T * 3 * stride + h * D + d[None, :]
    of_head = triple + offset + columns[:, None] * 3 * stride
    keys = tl.load(of_head + C, mask=is_there, other=0)
    values = tl.load(of_head + 2 * C, mask=is_there, other=0)
    low, high = load_key(words, b * planes + h)
    d_keys, d_values = tl.zeros((BLOCK_T, BLOCK_D), tl.float32), tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in range(tl.program_id(0) * BLOCK_T, T, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T)
        within = (rows[:, None] < T) & (d[None, :] < D)
        queries = tl.load(triple + offset + rows[:, None] * 3 * stride, mask=within, other=0)
        at_rows = b * T * stride + h * D + rows[:, None] * stride + d[None, :]
        d_rows = tl.load(d_out + at_rows, mask=within, other=0)
        lse_rows = tl.load(lse + head * T + rows, mask=rows < T, other=0)
        delta_rows = tl.load(delta + head * T + rows, mask=rows < T, other=0)
        weights = _weights(queries, keys, lse_rows, rows, columns, factor, T, PRECISION)
        keep = kept(low, high, rows[:, None], columns[None, :], cut, scale)
        d_values += product(tl.trans((weights * keep).to(d_rows.dtype)), d_rows, PRECISION)
        d_weights = product(d_rows, tl.trans(values), PRECISION) * keep
        d_scores = (weights * (d_weights - delta_rows[:, None])).to(queries.dtype)
        d_keys += product(tl.trans(d_scores), queries, PRECISION)
    to = d_triple + offset + columns[:, None] * 3 * stride
    tl.store(to + C, (d_keys * factor).to(d_triple.dtype.element_ty), mask=is_there)
    tl.store(to + 2 * C, d_values.to(d_triple.dtype.element_ty), mask=is_there)


def _blocks(triple: Tensor, T: int, H: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """The programs of a launch, and how large their blocks are; float32 is not rounded to fewer bits."""
    N, C = len(triple), triple.shape[1] // 3
    block = _FEW if T < 4 * _MANY else _MANY
    precision = "ieee" if triple.dtype == torch.float32 else "tf32"
    sizes = {"BLOCK_T": block, "BLOCK_D": power_of_two(C // H, least=16), "PRECISION": precision} | OPTIONS
    return (triton.cdiv(T, block), N // T * H), sizes


def _shape(triple: Tensor, words: Tensor, T: int, H: int) -> tuple[int, int, int, int, int, float]:
    C = triple.shape[1] // 3
    return T, H, C, C // H, words.shape[1], 1 / math.sqrt(C // H)


@operator("attend(Tensor triple, Tensor words_BP2, int T, int H, int cut, float scale) -> (Tensor, Tensor)")
def _launch_forward(triple: Tensor, words_BP2: Tensor, T: int, H: int, cut: int, scale: float) -> tuple[Tensor, Tensor]:
    N, C = len(triple), triple.shape[1] // 3
    out_NC, lse = triple.new_empty(N, C), triple.new_empty(N * H, dtype=torch.float32)
    grid, sizes = _blocks(triple, T, H)
    _forward[grid](triple, words_BP2, out_NC, lse, *_shape(triple, words_BP2, T, H), cut, scale, **sizes)
    return out_NC, lse


@operator(
    "attend_backward(Tensor triple, Tensor words_BP2, Tensor out_NC, Tensor lse, Tensor d_out_NC, int T, int H, "
    "int cut, float scale) -> Tensor"
)
def _launch_backward(
    triple: Tensor, words_BP2: Tensor, out_NC: Tensor, lse: Tensor, d_out_NC: Tensor, T: int, H: int, cut: int,
    scale: float,
) -> Tensor:  # fmt: skip
    d_triple, delta = torch.empty_like(triple), torch.empty_like(lse)
    grid, sizes = _blocks(triple, T, H)
    rest = (*_shape(triple, words_BP2, T, H), cut, scale)
    _backward_queries[grid](triple, words_BP2, out_NC, lse, d_out_NC, d_triple, delta, *rest, **sizes)
    _backward_keys[grid](triple, words_BP2, lse, d_out_NC, d_triple, delta, *rest, **sizes)
    return d_triple


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, triple: Tensor, words_BP2: Tensor, T: int, H: int, cut: int, scale: float) -> Tensor:
        out_NC: Tensor
        out_NC, lse = _launch_forward(triple, words_BP2, T, H, cut, scale)
        ctx.save_for_backward(triple, words_BP2, out_NC, lse)
        ctx.rest = T, H, cut, scale
        return out_NC

    @staticmethod
    def backward(ctx: Any, d_out_NC: Tensor) -> tuple[Tensor | None, ...]:
        d_triple = _launch_backward(*ctx.saved_tensors, d_out_NC.contiguous(), *ctx.rest)
        return d_triple, None, None, None, None, None


def attend(triple: Tensor, words_BP2: Tensor, *, T: int, H: int, cut: int, scale: float) -> Tensor:
    """What was attended to, (N, C), in the type of activations.

    Args:
        triple: queries, keys and values (N, 3 * C), each head by head.
        words_BP2: `words_of` the weights' planes, one a head.
        T: tokens of a window.
        H: heads.
        cut, scale: of the dropout, as `nanomoe.model.dropout` has them.
    """
    out_NC: Tensor = _Attend.apply(triple, words_BP2, T, H, cut, scale)
    return out_NC


def reference(triple: Tensor, mask_BHTT: Tensor) -> Tensor:
    """The same with a ready mask and the matrix of weights, as `nanomoe.model.gpt` has it."""
    B, H, T, _ = mask_BHTT.shape
    q, k, v = triple.view(B, T, 3, H, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
    scores_BHTT = (q @ k.transpose(-2, -1)) * (1 / math.sqrt(q.shape[-1]))
    future_TT = torch.ones(T, T, dtype=torch.bool, device=q.device).triu_(1)
    weights_BHTT = scores_BHTT.masked_fill(future_TT, float("-inf")).softmax(-1)
    y_BHTD = (weights_BHTT * mask_BHTT).to(v.dtype) @ v
    y_NC: Tensor = y_BHTD.transpose(1, 2).reshape(B * T, -1)
    return y_NC
