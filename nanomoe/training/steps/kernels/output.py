"""The output layer and its cross-entropy: the gradient of the logits is written over them, in their own type, so there
is never a matrix of logits in float32.

    loss = sum over rows of (logsumexp(logits) - logits[target]) / n_targets
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from nanomoe.training.steps.kernels.launching import OPTIONS, operator

_BLOCK = 4096


@triton.jit(do_not_specialize=["V"])
def _cross_entropy(logits_NV, targets_N, n_targets, losses_N, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_N + row)
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        v = first + tl.arange(0, BLOCK)
        logits = tl.load(logits_NV + row * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(most, logits)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(most - shift) + tl.exp(logits - shift)
        most = higher
    largest = tl.max(most, 0)
    lse = largest + tl.log(tl.sum(total * tl.exp(most - largest), 0))
    share = tl.where(target >= 0, 1 / tl.load(n_targets), 0.0)
    at_target = tl.load(logits_NV + row * V + tl.maximum(target, 0)).to(tl.float32)
    tl.store(losses_N + row, tl.where(target >= 0, (lse - at_target) * share, 0.0))
    for first in range(0, V, BLOCK):
        v = first + tl.arange(0, BLOCK)
        there = logits_NV + row * V + v
        logits = tl.load(there, mask=v < V, other=float("-inf")).to(tl.float32)
        d_logits = (tl.exp(logits - lse) - tl.where(v == target, 1.0, 0.0)) * share
        tl.store(there, d_logits.to(logits_NV.dtype.element_ty), mask=v < V)


@operator("cross_entropy_(Tensor(a!) logits_NV, Tensor targets_N, Tensor n_targets) -> Tensor")
def _launch(logits_NV: Tensor, targets_N: Tensor, n_targets: Tensor) -> Tensor:
    (N, V), losses_N = logits_NV.shape, logits_NV.new_empty(len(logits_NV), dtype=torch.float32)
    _cross_entropy[(N,)](logits_NV, targets_N, n_targets, losses_N, V, BLOCK=_BLOCK, **OPTIONS)
    return losses_N


class _OutputLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, n_targets: Tensor) -> Tensor:
        logits_NV = x_NC @ weight_VC.t()
        losses_N: Tensor = _launch(logits_NV, targets_N, n_targets)
        ctx.save_for_backward(x_NC, weight_VC, logits_NV)
        return losses_N.sum()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        x_NC, weight_VC, d_logits_NV = ctx.saved_tensors
        factor = d_loss.to(x_NC.dtype)
        return (d_logits_NV @ weight_VC) * factor, d_logits_NV.t() @ (x_NC * factor), None, None


def output_loss(x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, n_targets: Tensor) -> Tensor:
    """The loss, float32, 0-dim.

    Args:
        x_NC: what the output layer reads.
        weight_VC: its weights, in the same type.
        targets_N: int64, -1 where ignored.
        n_targets: what the sum is divided by, float32, 0-dim.
    """
    loss: Tensor = _OutputLoss.apply(x_NC, weight_VC, targets_N, n_targets)
    return loss


def reference(x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, n_targets: Tensor) -> Tensor:
    """The same by torch, with logits in float32."""
    logits_NV = F.linear(x_NC, weight_VC).float()
    return F.cross_entropy(logits_NV, targets_N, ignore_index=-1, reduction="sum") / n_targets
