"""The parameters, gradients and moments of several models of one shape as rows of flat buffers, and AdamW on all rows.

The models' parameters become views of one of the buffers, so that whoever reads a model sees what it has learnt. A row
is changed by the kernel that `nanomoe.training.optim` calls: one launch for what decays and one for what does not.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from nanomoe.config import TrainConfig
from nanomoe.model.gpt import GPT
from nanomoe.training.optim import decays

_ALIGNED = 16
"""Numbers to whose multiples a parameter's place is rounded up, so that every view lies as products like it."""


class StackedParameters:
    """W rows of P numbers: first the parameters that decay, then those that do not. Rows without a model have the
    weights of the first one."""

    def __init__(self, models: Sequence[GPT], configs: Sequence[TrainConfig], width: int, device: torch.device) -> None:
        """`width`: rows, at least as many as models."""
        self._configs = configs
        named = [dict(model.named_parameters()) for model in models]
        self._places: dict[str, tuple[int, torch.Size]] = {}
        end = self._n_decaying = 0
        for is_decaying in (True, False):
            for name, parameter in named[0].items():
                if decays(name, parameter) is is_decaying:
                    self._places[name] = end, parameter.shape
                    end += -(-parameter.numel() // _ALIGNED) * _ALIGNED
            if is_decaying:
                self._n_decaying = end
        flats = (torch.zeros(width, end, device=device) for _ in range(4))
        self._weights_WP, self._gradients_WP, self._exp_avg_WP, self._exp_avg_sq_WP = flats
        self._n_steps_W = torch.zeros(width, device=device)
        self._gradients = list(self._views(self._gradients_WP).values())
        for place in range(width):
            source = named[place if place < len(models) else 0]
            for name, view in self._views(self._weights_WP[place]).items():
                view.copy_(source[name].data)
                if place < len(models):
                    source[name].data, source[name].grad = view, None
        self.buffers = self._stacked_buffers(models, width)
        """What the models compute with and no gradient changes, by its name in a model: (W, ...)."""
        self._most_norm_W: Tensor | None = None
        """Where any gradient is clipped: infinite for those that are not."""
        if any(config.grad_clip is not None for config in configs):
            clips = [math.inf if config.grad_clip is None else config.grad_clip for config in configs]
            self._most_norm_W = torch.tensor(clips + [math.inf] * (width - len(clips)), device=device)

    @property
    def gradients(self) -> list[Tensor]:
        """All memory of gradients."""
        return [self._gradients_WP]

    def leaves(self) -> dict[str, Tensor]:
        """Each parameter of all models (W, ...), by its name in a model, for autograd."""
        return {name: view.detach().requires_grad_() for name, view in self._views(self._weights_WP).items()}

    def copy(self) -> dict[str, Tensor]:
        """A copy of each parameter and buffer of all models (W, ...), by its name in a model."""
        return self._views(self._weights_WP.clone()) | {name: buffer.clone() for name, buffer in self.buffers.items()}

    def balance_bias(self, layer: int) -> Tensor | None:
        """(W, E): the balance biases of a mixture, where it has any."""
        return self.buffers.get(f"transformer.h.{layer}.mlp.router.balance_bias")

    def take(self, gradients: Sequence[Tensor], *, adds: bool) -> None:
        """Set the gradients, in the order of `leaves`, or add to them."""
        if adds:
            torch._foreach_add_(self._gradients, list(gradients))
        else:
            torch._foreach_copy_(self._gradients, list(gradients))

    @torch.no_grad()
    def update(self, loss_W: Tensor, lr_W: Tensor, norm_W: Tensor, skipped_W: Tensor) -> None:
        """Clip each row's gradient and change its weights. All float32.

        Args:
            loss_W: those of the step.
            lr_W: its learning rates.
            norm_W: is set to the norms of the gradients before clipping.
            skipped_W: is set to 1 where loss or norm is not finite; where it is 1, nothing else of the row changes.
        """
        norm_W.copy_(torch.linalg.vector_norm(self._gradients_WP, dim=1))
        is_finite_W = loss_W.isfinite() & norm_W.isfinite()
        skipped_W.copy_(torch.maximum(skipped_W, (~is_finite_W).float()))
        self._n_steps_W.add_(1 - skipped_W)
        if self._most_norm_W is not None:
            self._gradients_WP.mul_((self._most_norm_W / (norm_W + 1e-6)).clamp(max=1.0)[:, None])
        for place, config in enumerate(self._configs):
            for columns, weight_decay in self._groups(config.weight_decay):
                rows = (self._weights_WP, self._gradients_WP, self._exp_avg_WP, self._exp_avg_sq_WP)
                torch._fused_adamw_(
                    *([flat[place, columns]] for flat in rows),
                    [],
                    [self._n_steps_W[place]],
                    lr=lr_W[place],  # type: ignore[call-overload] # either, but not what may be either
                    beta1=config.betas[0],
                    beta2=config.betas[1],
                    weight_decay=weight_decay,
                    eps=config.eps,
                    amsgrad=False,
                    maximize=False,
                    found_inf=skipped_W[place],
                )

    def _groups(self, weight_decay: float) -> Iterator[tuple[slice, float]]:
        """The columns with equal weight decay, and that."""
        yield slice(0, self._n_decaying), weight_decay
        if self._n_decaying < self._weights_WP.shape[1]:
            yield slice(self._n_decaying, None), 0.0

    def tensors(self, place: int) -> dict[str, Tensor]:
        """The state of every parameter of one model, named as `nanomoe.training.optim.AdamW` names it."""
        return {f"step.{name}": self._n_steps_W[place].clone() for name in self._places} | self._moments(place)

    def load(self, place: int, tensors: Mapping[str, Tensor]) -> None:
        """Take the state of one model over from a snapshot.

        Raises:
            KeyError: the state of a parameter is missing.
        """
        self._n_steps_W[place] = next(tensors[f"step.{name}"] for name in self._places)
        for name, moment in self._moments(place).items():
            moment.copy_(tensors[name])

    def _moments(self, place: int) -> dict[str, Tensor]:
        flats = {"exp_avg": self._exp_avg_WP[place], "exp_avg_sq": self._exp_avg_sq_WP[place]}
        return {f"{key}.{name}": view for key, flat in flats.items() for name, view in self._views(flat).items()}

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        """Each parameter in (..., P) numbers."""
        return {
            name: flat[..., at : at + shape.numel()].unflatten(-1, shape) for name, (at, shape) in self._places.items()
        }

    def _stacked_buffers(self, models: Sequence[GPT], width: int) -> dict[str, Tensor]:
        stacked: dict[str, Tensor] = {}
        for name, first in models[0].named_buffers():
            stacked[name] = first.repeat(width, *[1] * first.dim())
            for place, model in enumerate(models):
                module, _, leaf = name.rpartition(".")
                buffer = model.get_buffer(name)
                stacked[name][place].copy_(buffer)
                setattr(model.get_submodule(module), leaf, stacked[name][place])
        return stacked
