"""The forward and the backward pass of a model over one micro-batch, written out.

Each thread of a team does its share of the rows, of the attention's heads and of a matrix's gradient; between two of
these it waits for the others, since a head needs the rows of all, and a gradient too.

Shape letters as in `nanomoe.training.steps.loops`; R = B * H * T rows of the attention's matrices, head by head.
"""

import math

import numpy as np
import torch

from nanomoe.compiling import Array, Floats
from nanomoe.config import JobConfig
from nanomoe.model.dropout import EMBEDDING, Site, cut, scale
from nanomoe.training.steps.buffers import Buffer, as_array
from nanomoe.training.steps.dense import DenseFeedForward
from nanomoe.training.steps.feed_forward import FeedForward
from nanomoe.training.steps.loops import backward, forward
from nanomoe.training.steps.mixture import MixtureBuffers, MixtureFeedForward
from nanomoe.training.steps.parameters import FlatParameters
from nanomoe.training.steps.team import Team

_MOST_LOGITS = 1 << 24
"""Logits in memory at a time: where a micro-batch has more, the output layer takes some of its rows at a time."""


class _Norm:
    """A layer normalisation: its weights and their gradients, its input and output, and what the way back needs."""

    def __init__(self, of: "MicroBatch", parameters: FlatParameters, name: str) -> None:
        self.weight, self.d_weight = parameters.vector(f"{name}.weight", of.C)
        self.bias, self.d_bias = parameters.vector(f"{name}.bias", of.C)
        self.x = np.zeros((of.N, of.C), np.float32)
        self.out = of.buffer(of.N, of.C)
        self.mean, self.scale = np.zeros(of.N, np.float32), np.zeros(of.N, np.float32)

    @property
    def there(self) -> tuple[Floats, Floats, Floats, Array, Floats, Floats]:
        """The last arguments of a loop that ends with this norm."""
        return self.x, self.weight, self.bias, self.out.array, self.mean, self.scale

    def back(self, thread: int) -> tuple[Floats, Floats, Floats, Floats, Floats, Floats]:
        """The arguments of `norm_backward` from `x` on."""
        return self.x, self.mean, self.scale, self.weight, self.d_weight[thread], self.d_bias[thread]


class _Layer:
    """A block: its weights, and what the way back needs of the way there."""

    def __init__(self, of: "MicroBatch", parameters: FlatParameters, layer: int) -> None:
        name = f"transformer.h.{layer}"
        self.norm_1 = _Norm(of, parameters, f"{name}.ln_1")
        self.attn = parameters.matrices[f"{name}.attn.c_attn.weight"]
        self.attn_bias, self.d_attn_bias = parameters.vector(f"{name}.attn.c_attn.bias", 3 * of.C)
        self.queries, self.keys, self.values = (of.buffer(of.R, of.D, of.B * of.H) for _ in range(3))
        self.weights = np.zeros((of.R, of.T), np.float32)
        self.attended = of.buffer(of.N, of.C)
        self.attn_out = parameters.matrices[f"{name}.attn.c_proj.weight"]
        self.attn_out_bias, self.d_attn_out_bias = parameters.vector(f"{name}.attn.c_proj.bias", of.C)
        self.norm_2 = _Norm(of, parameters, f"{name}.ln_2")
        self.feed_forward = of.feed_forward(parameters, layer)


class MicroBatch:
    """The buffers of a micro-batch of B windows of T tokens, and its way there and back."""

    def __init__(
        self, B: int, T: int, parameters: FlatParameters, config: JobConfig, dtype: torch.dtype, team: Team
    ) -> None:
        """`dtype`: type of activations and products."""
        self._dtype, self._team, self._parameters = dtype, team, parameters
        self.B, self.T, self.C, self.H = B, T, config.n_embd, config.n_head
        self.N, self.D, self.F, self.R = B * T, self.C // self.H, 4 * self.C, B * self.H * T
        self._factor = np.float32(1 / math.sqrt(self.D))
        self._drop = np.uint32(cut(config.dropout)), np.float32(scale(config.dropout))
        self._ones = np.ones(self.N, np.float32)
        self._config = config
        self._wide = self.buffer(self.N, self.F)
        self._mixture_buffers = MixtureBuffers(T, self.N, config, dtype, team) if config.use_moe else None
        self._layers = [_Layer(self, parameters, layer) for layer in range(config.n_layer)]
        self._norm = _Norm(self, parameters, "transformer.ln_f")
        self._wte = as_array(parameters.weights["transformer.wte.weight"])
        self._wpe, self._d_wpe = parameters.positions()
        self._out = parameters.matrices["transformer.wte.weight"]
        self._d_wte = as_array(self._out.gradient)
        V = len(self._wte)
        self._logits = self.buffer(min(self.N, max(1, _MOST_LOGITS // V)), V)
        # What lies between two products, or a product and a loop, is one for all layers.
        self._narrow, self._d_mlp_out, self._d_attn_out, self._scaled = (self.buffer(self.N, self.C) for _ in range(4))
        self._triple = self.buffer(self.N, 3 * self.C)
        self._heads, self._d_queries, self._d_keys, self._d_values = (
            self.buffer(self.R, self.D, B * self.H) for _ in range(4)
        )
        # The loops write no weight of a later token: these stay zero.
        self._scores, self._dropped, self._d_scores = (self.buffer(self.R, T, B * self.H) for _ in range(3))
        self._d_x, self._d_embedded = (np.zeros((self.N, self.C), np.float32) for _ in range(2))
        self._share = np.zeros(self.N, np.float32)
        self._no_bias = [np.zeros(self.C, np.float32) for _ in range(team.n_threads)]
        """For the gradient of a bias that the embedding does not have."""

    def buffer(self, n_rows: int, n_columns: int, n_matrices: int = 1) -> Buffer:
        """A buffer in the type of the products."""
        return Buffer(n_rows, n_columns, self._dtype, self._team, n_matrices=n_matrices)

    def feed_forward(self, parameters: FlatParameters, layer: int) -> FeedForward:
        """That of a layer, its buffers new."""
        name = f"transformer.h.{layer}.mlp"
        if self._mixture_buffers is not None and self._config.is_moe_layer(layer):
            return MixtureFeedForward(parameters, name, self._config, self._drop, self._mixture_buffers)
        return DenseFeedForward(parameters, name, self._drop, self._wide, self._team)

    @property
    def mixtures(self) -> dict[int, MixtureFeedForward]:
        """The mixture of each layer that has one."""
        parts = enumerate(layer.feed_forward for layer in self._layers)
        return {n: part for n, part in parts if isinstance(part, MixtureFeedForward)}

    def gradient(self, inputs_BT: Array, targets_N: Array, keys: Array, share: float, *, adds: bool) -> float:
        """The micro-batch's loss, a sum times `share`. Its gradient is added to that of vectors and positions; that of
        matrices it is added to, or it becomes that."""
        of_step = share * np.count_nonzero(targets_N >= 0)

        def shared(thread: int) -> float:
            self._forward(thread, inputs_BT, keys)
            loss = self._output(thread, targets_N, share, adds)
            self._backward(thread, inputs_BT, keys, of_step, adds)
            return loss

        loss = sum(self._team.run(shared))
        self._parameters.add_up_vectors()
        return loss

    def _rows(self, thread: int) -> tuple[int, int]:
        rows = self._team.share(self.N, thread)
        return rows.start, rows.stop

    def _forward(self, thread: int, inputs_BT: Array, keys: Array) -> None:
        T, H, drop = self.T, self.H, self._drop
        rows = self._rows(thread)
        norms = [layer.norm_1 for layer in self._layers] + [self._norm]
        embedding = keys[EMBEDDING + 1, Site.ATTENTION_OUTPUT]
        forward.embed(*rows, inputs_BT, self._wte, self._wpe, embedding, *drop, *norms[0].there)
        for layer, own, next_norm in zip(self._layers, keys[1:], norms[1:], strict=True):
            torch.mm(layer.norm_1.out.rows[thread], layer.attn.transposed, out=self._triple.rows[thread])
            heads = layer.queries.array, layer.keys.array, layer.values.array
            forward.split_heads(*rows, T, H, self._triple.array, layer.attn_bias, *heads)
            self._team.wait(thread)
            self._attend(thread, layer, own[Site.ATTENTION_WEIGHTS])
            self._team.wait(thread)
            forward.from_heads(*rows, T, H, self._heads.array, layer.attended.array)
            torch.mm(layer.attended.rows[thread], layer.attn_out.transposed, out=self._narrow.rows[thread])
            forward.add_branch(
                *rows, T, layer.norm_1.x, self._narrow.array, layer.attn_out_bias, own[Site.ATTENTION_OUTPUT], *drop,
                *layer.norm_2.there,
            )  # fmt: skip
            mlp = layer.feed_forward
            mlp.forward(thread, layer.norm_2.out, own, self._narrow)
            forward.add_branch(
                *rows, T, layer.norm_2.x, self._narrow.array, mlp.bias, own[Site.MLP_OUTPUT], *mlp.drop,
                *next_norm.there,
            )  # fmt: skip

    def _attend(self, thread: int, layer: _Layer, keys_BP2: Array) -> None:
        """From queries, keys and values to what was attended to, in `_heads`."""
        heads = self._team.share(self.B * self.H, thread)
        torch.bmm(layer.queries.batch[thread], layer.keys.batch_transposed[thread], out=self._scores.batch[thread])
        forward.attend(
            heads.start, heads.stop, self.H, self._factor, self._scores.array, keys_BP2, *self._drop, layer.weights,
            self._dropped.array,
        )  # fmt: skip
        torch.bmm(self._dropped.batch[thread], layer.values.batch[thread], out=self._heads.batch[thread])

    def _output(self, thread: int, targets_N: Array, share: float, adds: bool) -> float:
        """The loss of the thread's rows; the output layer's gradient; and in `_narrow` that of its input, but for a
        factor per row."""
        loss, x, V = 0.0, self._norm.out, len(self._wte)
        most = len(self._logits.tensor)
        if most < self.N:
            self._team.wait(thread)  # a thread's share of a block is not its share of all rows
        for first in range(0, self.N, most):
            n = min(most, self.N - first)
            of_block = self._team.share(n, thread)
            rows = slice(first + of_block.start, first + of_block.stop)
            logits = self._logits.tensor[of_block]
            torch.mm(x.tensor[rows], self._out.transposed, out=logits)
            loss += forward.cross_entropy(
                self._logits.array[of_block], targets_N[rows], np.float32(share), x.array[rows], self._share[rows],
                self._scaled.array[rows],
            )  # fmt: skip
            torch.mm(logits, self._out.weight, out=self._narrow.tensor[rows])
            self._team.wait(thread)
            d_logits = self._logits.tensor[:n, self._team.share(V, thread)].t()
            self._out.add_gradient(thread, d_logits, self._scaled.tensor[first : first + n], adds=adds or first > 0)
            if first + n < self.N:
                self._team.wait(thread)
        return loss

    def _backward(self, thread: int, inputs_BT: Array, keys: Array, of_step: float, adds: bool) -> None:
        """From `_narrow` on. A matrix's gradient takes the rows of all threads: these are made where the heads wait for
        them anyway, that of the attention's first matrix in the layer below. `of_step`: the micro-batch's share of the
        step's targets."""
        T, H, drop = self.T, self.H, self._drop
        rows = self._rows(thread)
        narrow, d_mlp_out, d_attn_out, d_x = self._narrow, self._d_mlp_out, self._d_attn_out, self._d_x
        d_x[rows[0] : rows[1]] = 0
        norm, factor = self._norm, self._share
        above: _Layer | None = None
        for layer, own in zip(reversed(self._layers), keys[:0:-1], strict=True):
            mlp = layer.feed_forward
            backward.norm_backward(
                *rows, T, narrow.array, factor, *norm.back(thread), d_x, own[Site.MLP_OUTPUT], *mlp.drop,
                d_mlp_out.array, mlp.d_bias[thread],
            )  # fmt: skip
            mlp.backward(thread, own, d_mlp_out, narrow, of_step, adds=adds)
            backward.norm_backward(
                *rows, T, narrow.array, self._ones, *layer.norm_2.back(thread), d_x, own[Site.ATTENTION_OUTPUT], *drop,
                d_attn_out.array, layer.d_attn_out_bias[thread],
            )  # fmt: skip
            torch.mm(d_attn_out.rows[thread], layer.attn_out.weight, out=narrow.rows[thread])
            forward.to_heads(*rows, T, H, narrow.array, self._heads.array)
            self._team.wait(thread)
            if above is not None:
                self._add_attn_gradient(thread, above, adds)
            layer.attn_out.add_gradient(thread, d_attn_out.columns[thread], layer.attended.tensor, adds=adds)
            mlp.add_gradients(thread, layer.norm_2.out, d_mlp_out, adds=adds)
            self._attend_backward(thread, layer, own[Site.ATTENTION_WEIGHTS])
            self._team.wait(thread)
            heads = self._d_queries.array, self._d_keys.array, self._d_values.array
            backward.join_heads(*rows, T, H, *heads, self._triple.array, layer.d_attn_bias[thread])
            torch.mm(self._triple.rows[thread], layer.attn.weight, out=narrow.rows[thread])
            norm, factor, above = layer.norm_1, self._ones, layer
        embedding = keys[EMBEDDING + 1, Site.ATTENTION_OUTPUT]
        backward.norm_backward(
            *rows, T, narrow.array, factor, *norm.back(thread), d_x, embedding, *drop, self._d_embedded,
            self._no_bias[thread],
        )  # fmt: skip
        self._team.wait(thread)
        self._add_attn_gradient(thread, self._layers[0], adds)
        channels = self._team.share(self.C, thread)
        backward.embed_backward(channels.start, channels.stop, inputs_BT, self._d_embedded, self._d_wte, self._d_wpe)

    def _add_attn_gradient(self, thread: int, layer: _Layer, adds: bool) -> None:
        layer.attn.add_gradient(thread, self._triple.columns[thread], layer.norm_1.out.tensor, adds=adds)

    def _attend_backward(self, thread: int, layer: _Layer, keys_BP2: Array) -> None:
        """From the gradient of what was attended to, in `_heads`, to that of queries, keys and values."""
        heads = self._team.share(self.B * self.H, thread)
        d_out, d_scores, dropped = self._heads.batch[thread], self._d_scores, self._dropped
        torch.bmm(d_out, layer.values.batch_transposed[thread], out=self._scores.batch[thread])
        backward.attend_backward(
            heads.start, heads.stop, self.H, self._factor, self._scores.array, layer.weights, keys_BP2, *self._drop,
            d_scores.array, dropped.array,
        )  # fmt: skip
        torch.bmm(dropped.batch_transposed[thread], d_out, out=self._d_values.batch[thread])
        torch.bmm(d_scores.batch[thread], layer.keys.batch[thread], out=self._d_queries.batch[thread])
        torch.bmm(d_scores.batch_transposed[thread], layer.queries.batch[thread], out=self._d_keys.batch[thread])
