"""A model's training loss with kernels between its matrix products; its reference is `EagerStep.objective`.

The experts of a mixture are computed by its own module, operator by operator.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nanomoe.config import JobConfig
from nanomoe.model.dropout import EMBEDDING, Counters, Dropout, LayerDropout, Site, cut, scale
from nanomoe.model.gpt import GPT, MLP, LayerNorm
from nanomoe.model.moe import MoE, Routing
from nanomoe.training.steps.kernels.attention import attend
from nanomoe.training.steps.kernels.branch import add_branch
from nanomoe.training.steps.kernels.gelu import bias_gelu
from nanomoe.training.steps.kernels.masks import plane_keys, words_of
from nanomoe.training.steps.kernels.output import output_loss
from nanomoe.training.steps.kernels.router import route_by

_Branch = tuple[Tensor, Tensor | None, Tensor | None]
"""What is to be added to the stream: a product, its bias, and the words of its mask."""


class _Narrowed(torch.autograd.Function):
    """Copies of float32 weights in the type of the products, all in a launch or two, and so on the way back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        copies = tuple(torch.empty_like(weight, dtype=dtype) for weight in weights)
        torch._foreach_copy_(copies, weights)
        return copies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wide = [torch.empty_like(gradient, dtype=torch.float32) for gradient in gradients]
        torch._foreach_copy_(wide, list(gradients))
        return None, *wide


class Network:
    """The forward pass of a model in training, written for one type of activations."""

    def __init__(self, model: GPT, config: JobConfig, activations: torch.dtype, counters: Counters) -> None:
        self._model = model
        self._config = config
        self._activations = activations
        self._counters = counters
        self._cut, self._scale = cut(config.dropout), scale(config.dropout)
        named = dict(model.named_parameters())
        ends = ("c_attn.weight", "c_attn.bias", "c_proj.weight", "c_fc.weight", "wte.weight")
        self._of_products = {name: weight for name, weight in named.items() if name.endswith(ends)}

    def loss(
        self, inputs_BT: Tensor, targets_BT: Tensor, keys_B: Tensor, n_targets: Tensor
    ) -> tuple[Tensor, dict[int, Routing]]:
        """Sum of the cross-entropies over `n_targets` (float32, 0-dim), and the routing of each MoE layer.

        Args:
            inputs_BT: tokens, int64.
            targets_BT: their targets, int64.
            keys_B: the `window_keys` of the windows, int64.
        """
        _, T = inputs_BT.shape
        transformer = self._model.transformer
        weights = self._narrowed()
        keys = plane_keys(self._config, keys_B) if self._config.dropout > 0 else None
        embedded = transformer.wte(inputs_BT) + transformer.wpe.weight[:T]
        x_NC: Tensor | None = None
        branch: _Branch = embedded.flatten(0, 1), None, self._words(keys, EMBEDDING, Site.ATTENTION_OUTPUT)
        routings = {}
        for block in self._model.blocks:
            name, layer = f"transformer.h.{block.layer}", block.layer
            x_NC, normed = self._add(x_NC, branch, block.ln_1, T, self._activations)
            attended = self._attend(
                normed, weights, f"{name}.attn.c_attn", self._words(keys, layer, Site.ATTENTION_WEIGHTS), T
            )
            y_NC = F.linear(attended, weights[f"{name}.attn.c_proj.weight"])
            branch = y_NC, block.attn.c_proj.bias, self._words(keys, layer, Site.ATTENTION_OUTPUT)
            if isinstance(block.mlp, MLP):
                x_NC, normed = self._add(x_NC, branch, block.ln_2, T, self._activations)
                hidden_NF = bias_gelu(F.linear(normed, weights[f"{name}.mlp.c_fc.weight"]), block.mlp.c_fc.bias)
                y_NC = F.linear(hidden_NF, weights[f"{name}.mlp.c_proj.weight"])
                branch = y_NC, block.mlp.c_proj.bias, self._words(keys, layer, Site.MLP_OUTPUT)
            else:  # routers read float32
                x_NC, normed = self._add(x_NC, branch, block.ln_2, T, torch.float32)
                y_NC, routings[layer] = self._mixture(layer, block.mlp, normed.view_as(embedded), keys, keys_B)
                branch = y_NC, None, None
        _, normed = self._add(x_NC, branch, transformer.ln_f, T, self._activations)
        loss = output_loss(normed, weights["transformer.wte.weight"], targets_BT.flatten(), n_targets)
        return loss, routings

    def _narrowed(self) -> dict[str, Tensor]:
        if self._activations == torch.float32:
            return dict(self._of_products)
        copies = _Narrowed.apply(self._activations, *self._of_products.values())
        return dict(zip(self._of_products, copies, strict=True))

    def _words(self, keys: Tensor | None, layer: int, site: Site) -> Tensor | None:
        return None if keys is None else words_of(keys, layer, site)

    def _add(
        self,
        x_NC: Tensor | None,
        branch: _Branch,
        norm: LayerNorm,
        T: int,
        out: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        return add_branch(x_NC, *branch, norm.weight, norm.bias, T=T, out=out, cut=self._cut, scale=self._scale)

    def _attend(self, normed_NC: Tensor, weights: dict[str, Tensor], name: str, words: Tensor | None, T: int) -> Tensor:
        H = self._config.n_head
        triple = F.linear(normed_NC, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
        if words is not None:
            return attend(triple, words, T=T, H=H, cut=self._cut, scale=self._scale)
        q, k, v = triple.view(-1, T, 3, H, triple.shape[1] // (3 * H)).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2).flatten(0, 1)

    def _mixture(
        self, layer: int, moe: MoE, normed_BTC: Tensor, keys: Tensor | None, keys_B: Tensor
    ) -> tuple[Tensor, Routing]:
        config, (_, T, C) = self._config, normed_BTC.shape
        dropout = Dropout.of_window_keys(config, keys_B, dtype=self._activations, counters=self._counters, planes=keys)
        keep = None
        if keys is not None:
            keep = LayerDropout(dropout, layer).of_experts(T, config.k + config.n_shared_experts, C)
        noise_TE = dropout.noise(layer, T, config.n_experts).flatten(0, 1) if config.router_noise else None
        x_TC = normed_BTC.flatten(0, 1)
        logits_TE, route = route_by(moe.router, x_TC, noise_TE)
        with torch.autocast(x_TC.device.type, self._activations, enabled=self._activations != torch.float32):
            y_TC, dropped = moe.mix(x_TC, route.chosen_TK, route.gates_TK, keep=keep)
        return y_TC.float(), Routing(logits_TE=logits_TE, dropped=dropped, **route._asdict())
