"""The update in three launches: the squares of the whole gradient, what follows from its norm, and AdamW with clipping
in one pass over flat buffers.

AdamW as in `nanomoe.training.optim`, whose formulas these are; the numbers that one step has in common lie on the
device, so that a captured step reads those of its time.
"""

import math
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from nanomoe.config import TrainConfig
from nanomoe.training.optim import decays
from nanomoe.training.steps.kernels.launching import OPTIONS, operator, power_of_two

_ALIGNED = 16
"""Numbers to whose multiples a parameter's place is rounded up, so that every view lies as kernels like it."""

_BLOCK = 1024
_MOST_SUMS = 1024


@triton.jit(do_not_specialize=["n"])
def _squares(gradients, sums, n, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        index = first + tl.arange(0, BLOCK)
        gradient = tl.load(gradients + index, mask=index < n, other=0)
        total += gradient * gradient
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=["n_sums", "most_norm"])
def _prepare(
    sums, loss, lr, norm, skipped, step, numbers, n_sums, most_norm, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The norm; whether this step and all later ones are skipped; the step's number; and `numbers`: factor of the
    gradient, learning rate, lr over the first bias correction, root of the second, whether skipped."""
    index = tl.arange(0, BLOCK)
    total = tl.sqrt(tl.sum(tl.load(sums + index, mask=index < n_sums, other=0), 0))
    tl.store(norm, total)
    largest = 3.4028234663852886e38
    is_finite = (total <= largest) & (tl.abs(tl.load(loss)) <= largest)
    skips = tl.maximum(tl.load(skipped), tl.where(is_finite, 0.0, 1.0))
    tl.store(skipped, skips)
    number = tl.load(step) + 1 - skips
    tl.store(step, number)
    exact = tl.maximum(number, 1).to(tl.float64)  # 0 where the first step of all is skipped
    correction1 = 1 - tl.exp(exact * tl.full((), LOG_BETA1, tl.float64))
    correction2 = 1 - tl.exp(exact * tl.full((), LOG_BETA2, tl.float64))
    rate = tl.load(lr)
    tl.store(numbers, tl.minimum(most_norm / (total + 1e-6), 1.0))
    tl.store(numbers + 1, rate)
    tl.store(numbers + 2, (rate.to(tl.float64) / correction1).to(tl.float32))
    tl.store(numbers + 3, tl.sqrt(correction2).to(tl.float32))
    tl.store(numbers + 4, skips)


@triton.jit(do_not_specialize=["n", "n_decaying", "decay", "rest1", "rest2", "eps"])
def _adamw(
    weights, gradients, means, mean_squares, numbers, n, n_decaying, decay, rest1, rest2, eps, BLOCK: tl.constexpr
):
    if tl.load(numbers + 4) == 0:
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = index < n
        gradient = tl.load(gradients + index, mask=inside, other=0) * tl.load(numbers)
        mean = tl.load(means + index, mask=inside, other=0)
        mean_square = tl.load(mean_squares + index, mask=inside, other=0)
        mean += rest1 * (gradient - mean)
        mean_square += rest2 * (gradient * gradient - mean_square)
        weight = tl.load(weights + index, mask=inside, other=0)
        weight -= tl.where(index < n_decaying, tl.load(numbers + 1) * decay, 0.0) * weight
        root = tl.sqrt(mean_square) / tl.load(numbers + 3)
        weight -= tl.load(numbers + 2) * mean / (root + eps)
        tl.store(means + index, mean, mask=inside)
        tl.store(mean_squares + index, mean_square, mask=inside)
        tl.store(weights + index, weight, mask=inside)


@operator("sum_of_squares(Tensor flat) -> Tensor")
def _launch_squares(flat: Tensor) -> Tensor:
    n = flat.numel()
    sums = flat.new_empty(min(_MOST_SUMS, triton.cdiv(n, _BLOCK)))
    _squares[(len(sums),)](flat, sums, n, BLOCK=_BLOCK, **OPTIONS)
    return sums


@operator(
    "prepare_update(Tensor sums, Tensor loss, Tensor lr, Tensor(a!) norm, Tensor(b!) skipped, Tensor(c!) step, "
    "float most_norm, float beta1, float beta2) -> Tensor"
)
def _launch_prepare(
    sums: Tensor, loss: Tensor, lr: Tensor, norm: Tensor, skipped: Tensor, step: Tensor, most_norm: float,
    beta1: float, beta2: float,
) -> Tensor:  # fmt: skip
    numbers = sums.new_empty(5)
    logs = (math.log(max(beta, 1e-300)) for beta in (beta1, beta2))
    _prepare[(1,)](
        sums,
        loss,
        lr,
        norm,
        skipped,
        step,
        numbers,
        len(sums),
        most_norm,
        *logs,
        BLOCK=power_of_two(len(sums)),
        **OPTIONS,
    )
    return numbers


@operator(
    "adamw_(Tensor(a!) weights, Tensor gradients, Tensor(b!) means, Tensor(c!) mean_squares, Tensor numbers, "
    "int n_decaying, float decay, float beta1, float beta2, float eps) -> ()"
)
def _launch_adamw(
    weights: Tensor, gradients: Tensor, means: Tensor, mean_squares: Tensor, numbers: Tensor, n_decaying: int,
    decay: float, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    n = weights.numel()
    _adamw[(triton.cdiv(n, _BLOCK),)](
        weights,
        gradients,
        means,
        mean_squares,
        numbers,
        n,
        n_decaying,
        decay,
        1 - beta1,
        1 - beta2,
        eps,
        BLOCK=_BLOCK,
        **OPTIONS,
    )


class FlatAdamW:
    """A model's parameters, gradients and moments as flat float32 buffers: first what decays, then what does not.

    The model's parameters and their gradients become views of them.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self._config = config
        named = dict(model.named_parameters())
        self._places: dict[str, tuple[int, torch.Size]] = {}
        end = self._n_decaying = 0
        for is_decaying in (True, False):
            for name, parameter in named.items():
                if decays(name, parameter) is is_decaying:
                    self._places[name] = end, parameter.shape
                    end += -(-parameter.numel() // _ALIGNED) * _ALIGNED
            if is_decaying:
                self._n_decaying = end
        one = next(iter(named.values()))
        self._weights, self._gradients, self._means, self._mean_squares = (one.data.new_zeros(end) for _ in range(4))
        self._step = one.data.new_zeros(())
        weights, gradients = self._views(self._weights), self._views(self._gradients)
        for name, parameter in named.items():
            weights[name].copy_(parameter.data)
            parameter.data, parameter.grad = weights[name], gradients[name]

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        return {name: flat[at : at + shape.numel()].view(shape) for name, (at, shape) in self._places.items()}

    @torch.no_grad()
    def update(self, loss: Tensor, lr: Tensor, norm: Tensor, skipped: Tensor) -> None:
        """Clip and apply the gradient, all arguments float32, 0-dim, on the device.

        Args:
            loss: the step's.
            lr: its learning rate.
            norm: is set to the gradient's norm before clipping.
            skipped: is set to 1 where loss or norm is not finite; where it is 1, nothing else changes.
        """
        config, (beta1, beta2) = self._config, self._config.betas
        sums = _launch_squares(self._gradients)
        most_norm = math.inf if config.grad_clip is None else config.grad_clip
        numbers = _launch_prepare(sums, loss, lr, norm, skipped, self._step, most_norm, beta1, beta2)
        _launch_adamw(
            self._weights, self._gradients, self._means, self._mean_squares, numbers, self._n_decaying,
            config.weight_decay, beta1, beta2, config.eps,
        )  # fmt: skip

    def moments(self) -> dict[str, Tensor]:
        """The averages of each parameter's gradient and squared gradient, by the names under which they are saved."""
        flats = {"exp_avg": self._means, "exp_avg_sq": self._mean_squares}
        return {f"{key}.{name}": view for key, flat in flats.items() for name, view in self._views(flat).items()}

    def tensors(self) -> dict[str, Tensor]:
        """The state of every parameter, named as `nanomoe.training.optim.AdamW` names it."""
        return {f"step.{name}": self._step.clone() for name in self._places} | self.moments()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the state over from a snapshot.

        Raises:
            KeyError: the state of a parameter is missing.
        """
        self._step.copy_(next(tensors[f"step.{name}"] for name in self._places))
        for name, moment in self.moments().items():
            moment.copy_(tensors[name])
