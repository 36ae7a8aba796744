"""The forward and the backward pass of a model over one micro-batch, written out.

Shape letters as in `nanomoe.training.steps.loops`; R = B * H * T rows of the attention's matrices, head by head.
"""

import math

import numpy as np
import torch

from nanomoe.compiling import Array, Floats, even_bounds, in_parts
from nanomoe.config import JobConfig
from nanomoe.model.dropout import EMBEDDING, Site, cut, scale
from nanomoe.training.steps.buffers import Buffer, as_array
from nanomoe.training.steps.dense import DenseFeedForward
from nanomoe.training.steps.feed_forward import FeedForward
from nanomoe.training.steps.loops import backward, forward
from nanomoe.training.steps.mixture import MixtureBuffers, MixtureFeedForward
from nanomoe.training.steps.parameters import FlatParameters

_MOST_LOGITS = 1 << 24
"""Logits in memory at a time: where a micro-batch has more, the output layer takes some of its rows at a time."""


class _Norm:
    """A layer normalisation: its weights and their gradients, its input and output, and what the way back needs."""

    def __init__(self, of: "MicroBatch", parameters: FlatParameters, name: str) -> None:
        self.weight, self.d_weight = parameters.vector(f"{name}.weight", of.no_bias)
        self.bias, self.d_bias = parameters.vector(f"{name}.bias", of.no_bias)
        self.x = np.zeros((of.N, of.C), np.float32)
        self.out = of.buffer(of.N, of.C)
        self.mean, self.scale = np.zeros(of.N, np.float32), np.zeros(of.N, np.float32)

    @property
    def there(self) -> tuple[Floats, Floats, Floats, Array, Floats, Floats]:
        """The last arguments of a loop that ends with this norm."""
        return self.x, self.weight, self.bias, self.out.array, self.mean, self.scale

    @property
    def back(self) -> tuple[Floats, Floats, Floats, Floats, Floats, Floats]:
        """The arguments of `norm_backward` from `x` on."""
        return self.x, self.mean, self.scale, self.weight, self.d_weight, self.d_bias


class _Layer:
    """A block: its weights, and what the way back needs of the way there."""

    def __init__(self, of: "MicroBatch", parameters: FlatParameters, layer: int) -> None:
        name = f"transformer.h.{layer}"
        self.norm_1 = _Norm(of, parameters, f"{name}.ln_1")
        self.attn = parameters.matrices[f"{name}.attn.c_attn.weight"]
        self.attn_bias, self.d_attn_bias = parameters.vector(f"{name}.attn.c_attn.bias", of.no_bias)
        self.queries, self.keys, self.values = (of.buffer(of.R, of.D, of.B * of.H) for _ in range(3))
        self.weights = np.zeros((of.R, of.T), np.float32)
        self.attended = of.buffer(of.N, of.C)
        self.attn_out = parameters.matrices[f"{name}.attn.c_proj.weight"]
        self.attn_out_bias, self.d_attn_out_bias = parameters.vector(f"{name}.attn.c_proj.bias", of.no_bias)
        self.norm_2 = _Norm(of, parameters, f"{name}.ln_2")
        self.feed_forward = of.feed_forward(parameters, layer)


class MicroBatch:
    """The buffers of a micro-batch of B windows of T tokens, and its way there and back."""

    def __init__(self, B: int, T: int, parameters: FlatParameters, config: JobConfig, dtype: torch.dtype) -> None:
        """`dtype`: type of activations and products."""
        self._dtype = dtype
        self.B, self.T, self.C, self.H = B, T, config.n_embd, config.n_head
        self.N, self.D, self.F, self.R = B * T, self.C // self.H, 4 * self.C, B * self.H * T
        self.no_bias = np.zeros(self.F, np.float32), np.zeros(self.F, np.float32)
        """What stands in for a bias, zeros, and for its gradient, which nobody reads."""
        self._factor = np.float32(1 / math.sqrt(self.D))
        self._drop = np.uint32(cut(config.dropout)), np.float32(scale(config.dropout))
        self._ones = np.ones(self.N, np.float32)
        self._config = config
        self._wide = self.buffer(self.N, self.F)
        self._mixture_buffers = MixtureBuffers(T, self.N, config, dtype) if config.use_moe else None
        self._layers = [_Layer(self, parameters, layer) for layer in range(config.n_layer)]
        self._norm = _Norm(self, parameters, "transformer.ln_f")
        self._wte = as_array(parameters.weights["transformer.wte.weight"])
        self._wpe, self._d_wpe = parameters.vector("transformer.wpe.weight", self.no_bias)
        self._out = parameters.matrices["transformer.wte.weight"]
        self._d_wte = as_array(self._out.gradient)
        V = len(self._wte)
        self._logits = self.buffer(min(self.N, max(1, _MOST_LOGITS // V)), V)
        # What lies between two products, or a product and a loop, is one for all layers.
        self._narrow, self._branch, self._scaled = (self.buffer(self.N, self.C) for _ in range(3))
        self._triple = self.buffer(self.N, 3 * self.C)
        self._heads, self._d_queries, self._d_keys, self._d_values = (
            self.buffer(self.R, self.D, B * self.H) for _ in range(4)
        )
        # The loops write no weight of a later token: these stay zero.
        self._scores, self._dropped, self._d_scores = (self.buffer(self.R, T, B * self.H) for _ in range(3))
        self._d_x, self._d_embedded = (np.zeros((self.N, self.C), np.float32) for _ in range(2))
        self._share = np.zeros(self.N, np.float32)

    def buffer(self, n_rows: int, n_columns: int, n_matrices: int = 1) -> Buffer:
        """A buffer in the type of the products."""
        return Buffer(n_rows, n_columns, self._dtype, n_matrices=n_matrices)

    def feed_forward(self, parameters: FlatParameters, layer: int) -> FeedForward:
        """That of a layer, its buffers new."""
        name = f"transformer.h.{layer}.mlp"
        if self._mixture_buffers is not None and self._config.is_moe_layer(layer):
            return MixtureFeedForward(parameters, name, self._config, self._drop, self._mixture_buffers)
        return DenseFeedForward(parameters, name, self.no_bias, self._drop, self._wide)

    @property
    def mixtures(self) -> dict[int, MixtureFeedForward]:
        """The mixture of each layer that has one."""
        parts = enumerate(layer.feed_forward for layer in self._layers)
        return {n: part for n, part in parts if isinstance(part, MixtureFeedForward)}

    def gradient(self, inputs_BT: Array, targets_N: Array, keys: Array, share: float, *, adds: bool) -> float:
        """The micro-batch's loss, a sum times `share`. Its gradient is added to that of vectors and positions; that of
        matrices it is added to, or it becomes that."""
        self._forward(inputs_BT, keys)
        loss = self._output(targets_N, share, adds)
        self._backward(inputs_BT, keys, share * np.count_nonzero(targets_N >= 0), adds)
        return loss

    def _forward(self, inputs_BT: Array, keys: Array) -> None:
        B, T, H, drop = self.B, self.T, self.H, self._drop
        norms = [layer.norm_1 for layer in self._layers] + [self._norm]
        embedding = keys[EMBEDDING + 1, Site.ATTENTION_OUTPUT]
        forward.embed(inputs_BT, self._wte, self._wpe, embedding, *drop, *norms[0].there)
        for layer, own, next_norm in zip(self._layers, keys[1:], norms[1:], strict=True):
            torch.mm(layer.norm_1.out.tensor, layer.attn.transposed, out=self._triple.tensor)
            heads = layer.queries.array, layer.keys.array, layer.values.array
            forward.split_heads(B, H, self._triple.array, layer.attn_bias, *heads)
            torch.bmm(layer.queries.batch, layer.keys.batch_transposed, out=self._scores.batch)
            forward.attend(
                H, self._factor, self._scores.array, own[Site.ATTENTION_WEIGHTS], *drop, layer.weights,
                self._dropped.array,
            )  # fmt: skip
            torch.bmm(self._dropped.batch, layer.values.batch, out=self._heads.batch)
            forward.from_heads(B, H, self._heads.array, layer.attended.array)
            torch.mm(layer.attended.tensor, layer.attn_out.transposed, out=self._narrow.tensor)
            forward.add_branch(
                T, layer.norm_1.x, self._narrow.array, layer.attn_out_bias, own[Site.ATTENTION_OUTPUT], *drop,
                *layer.norm_2.there,
            )  # fmt: skip
            mlp = layer.feed_forward
            mlp.forward(layer.norm_2.out, own, self._narrow)
            forward.add_branch(
                T, layer.norm_2.x, self._narrow.array, mlp.bias, own[Site.MLP_OUTPUT], *mlp.drop, *next_norm.there
            )

    def _output(self, targets_N: Array, share: float, adds: bool) -> float:
        """The loss; the output layer's gradient; and in `_narrow` that of its input, but for a factor per row."""
        loss = 0.0
        most = len(self._logits.tensor)
        for first in range(0, self.N, most):
            rows = slice(first, min(first + most, self.N))
            n = rows.stop - first
            logits, x = self._logits.tensor[:n], self._norm.out
            torch.mm(x.tensor[rows], self._out.transposed, out=logits)
            arrays = targets_N[rows], x.array[rows], self._share[rows], self._scaled.array[rows]
            loss += _cross_entropy(self._logits.array[:n], np.float32(share), *arrays)
            self._out.add_gradient(logits.t(), self._scaled.tensor[rows], adds=adds or first > 0)
            torch.mm(logits, self._out.weight, out=self._narrow.tensor[rows])
        return loss

    def _backward(self, inputs_BT: Array, keys: Array, share: float, adds: bool) -> None:
        T, drop = self.T, self._drop
        narrow, branch, d_x = self._narrow, self._branch, self._d_x
        d_x.fill(0)
        norm, factor = self._norm, self._share
        for layer, own in zip(reversed(self._layers), keys[:0:-1], strict=True):
            mlp = layer.feed_forward
            backward.norm_backward(
                T, narrow.array, factor, *norm.back, d_x, own[Site.MLP_OUTPUT], *mlp.drop, branch.array, mlp.d_bias
            )
            mlp.backward(layer.norm_2.out, own, branch, narrow, share, adds=adds)
            backward.norm_backward(
                T, narrow.array, self._ones, *layer.norm_2.back, d_x, own[Site.ATTENTION_OUTPUT], *drop,
                branch.array, layer.d_attn_out_bias,
            )  # fmt: skip
            layer.attn_out.add_gradient(branch.transposed, layer.attended.tensor, adds=adds)
            torch.mm(branch.tensor, layer.attn_out.weight, out=narrow.tensor)
            self._attention_backward(layer, own[Site.ATTENTION_WEIGHTS])
            layer.attn.add_gradient(self._triple.transposed, layer.norm_1.out.tensor, adds=adds)
            torch.mm(self._triple.tensor, layer.attn.weight, out=narrow.tensor)
            norm, factor = layer.norm_1, self._ones
        backward.norm_backward(
            T, narrow.array, factor, *norm.back, d_x, keys[EMBEDDING + 1, Site.ATTENTION_OUTPUT], *drop,
            self._d_embedded, self.no_bias[1],
        )  # fmt: skip
        backward.embed_backward(inputs_BT, self._d_embedded, self._d_wte, self._d_wpe)

    def _attention_backward(self, layer: _Layer, keys_BP2: Array) -> None:
        """From the gradient of what was attended to, in `_narrow`, to that of queries, keys and values in `_triple`."""
        B, H = self.B, self.H
        d_out, d_scores, dropped = self._heads, self._d_scores, self._dropped
        forward.to_heads(B, H, self._narrow.array, d_out.array)
        torch.bmm(d_out.batch, layer.values.batch_transposed, out=self._scores.batch)
        backward.attend_backward(
            H, self._factor, self._scores.array, layer.weights, keys_BP2, *self._drop, d_scores.array, dropped.array
        )
        torch.bmm(dropped.batch_transposed, d_out.batch, out=self._d_values.batch)
        torch.bmm(d_scores.batch, layer.keys.batch, out=self._d_queries.batch)
        torch.bmm(d_scores.batch_transposed, layer.queries.batch, out=self._d_keys.batch)
        heads = self._d_queries.array, self._d_keys.array, self._d_values.array
        backward.join_heads(B, H, *heads, self._triple.array, layer.d_attn_bias)


def _cross_entropy(
    logits_NV: Array, share: np.float32, targets_N: Array, x_NC: Array, share_N: Floats, scaled_NC: Array
) -> float:
    def of_rows(first: int, end: int) -> float:
        rows = slice(first, end)
        return forward.cross_entropy(
            logits_NV[rows], targets_N[rows], share, x_NC[rows], share_N[rows], scaled_NC[rows]
        )

    return sum(in_parts(of_rows, even_bounds(len(logits_NV), torch.get_num_threads())))
