"""AdamW, which parameters it decays, and the learning-rate schedule."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nanomoe.config import TrainConfig

_STATE = ("step", "exp_avg", "exp_avg_sq")
"""The state of a parameter, by the names of torch's own class: `step` of the parameter `w` is saved as `step.w`."""


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay goes by role: matrices decay; LayerNorm weights and biases, stacked (E, F) or not, never do."""
    leaf = name.rsplit(".", 1)[-1]
    return parameter.dim() >= 2 and leaf not in ("bias", "b_in", "b_out")


class ParameterGroup:
    """Parameters with the same weight decay, and the state of each: its step count and the averages of its gradient and
    of its squared gradient."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], weight_decay: float) -> None:
        self.parameters = dict(parameters)
        """Parameters by their names in the model."""
        self.weight_decay = weight_decay
        """Coefficient of the weight decay."""
        self.step = [torch.zeros((), dtype=torch.float32, device=p.device) for p in parameters.values()]
        self.exp_avg = [torch.zeros_like(p) for p in parameters.values()]
        self.exp_avg_sq = [torch.zeros_like(p) for p in parameters.values()]

    def tensors(self) -> dict[str, Tensor]:
        """The state by the names under which it is saved."""
        return {
            f"{key}.{name}": tensor
            for key in _STATE
            for name, tensor in zip(self.parameters, getattr(self, key), strict=True)
        }


class AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), computed by torch's fused kernel.

    The bits are those of `torch.optim.AdamW(fused=True)`, with which a test compares it. That class is not used itself
    because making one imports `torch._dynamo`, which costs every training process a second of processor time and
    serves nothing here.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        """One group of parameters decays and one does not, as `decays` says. Every parameter must get a gradient."""
        named = dict(model.named_parameters())
        self.lr: float | Tensor = config.lr
        """Learning rate of the next step. A tensor (0-dim, float32, on the device) where a captured step is to read the
        rate of its time, not the one at which it was captured."""
        self.groups = [
            ParameterGroup({name: p for name, p in named.items() if decays(name, p)}, config.weight_decay),
            ParameterGroup({name: p for name, p in named.items() if not decays(name, p)}, 0.0),
        ]
        self._beta1, self._beta2 = config.betas
        self._eps = config.eps

    @torch.no_grad()
    def step(self, skipped: Tensor | None = None) -> None:
        """Change the parameters by their gradients. Where `skipped` (0-dim, float32, on the device) is 1 and not 0,
        change nothing."""
        for group in self.groups:
            if not group.parameters:
                continue
            gradients = [p.grad for p in group.parameters.values() if p.grad is not None]
            assert len(gradients) == len(group.parameters), "every parameter has a gradient"
            if skipped is None:
                torch._foreach_add_(group.step, 1)
            else:  # without an alpha, the number would be read back to the host
                torch._foreach_add_(group.step, 1 - skipped, alpha=1)
            torch._fused_adamw_(
                list(group.parameters.values()),
                gradients,
                group.exp_avg,
                group.exp_avg_sq,
                [],
                group.step,
                lr=self.lr,  # type: ignore[arg-type] # either, but not what may be either
                beta1=self._beta1,
                beta2=self._beta2,
                weight_decay=group.weight_decay,
                eps=self._eps,
                amsgrad=False,
                maximize=False,
                found_inf=skipped,
            )

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for group in self.groups:
            for parameter in group.parameters.values():
                parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The state of every parameter, for a snapshot: `step.NAME`, `exp_avg.NAME` and `exp_avg_sq.NAME`."""
        return {name: tensor for group in self.groups for name, tensor in group.tensors().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the state over from a snapshot, which may hold other tensors too.

        Raises:
            KeyError: the state of a parameter is missing.
        """
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """The rate of step `step`, from 0: linear warm-up, then constant or half a cosine from `lr` to `min_lr`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * min(1.0, progress))) * (config.lr - config.min_lr)
