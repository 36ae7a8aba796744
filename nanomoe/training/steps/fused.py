"""An optimizer step on a CPU written out: products by torch into buffers that stay, everything between them in compiled
loops, no autograd. It computes what `nanomoe.training.steps.eager` computes, with the same dropout masks.

Weights, gradients and moments are flat buffers; the model's parameters are views of one, so that whoever reads the
model sees what was learnt. Shape letters as in `nanomoe.training.steps.loops`.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from nanomoe.config import JobConfig
from nanomoe.data import Windows
from nanomoe.model.dropout import EMBEDDING, Site, cut, plane_keys, scale
from nanomoe.model.gpt import GPT
from nanomoe.training.optim import decays
from nanomoe.training.steps.loops import backward, forward, update
from nanomoe.training.steps.loops.compiling import Array, Floats
from nanomoe.training.steps.step import Part, TrainingStep

_ALIGNED = 16
"""Numbers to whose multiples a parameter's place is rounded up: a cache line."""

_ROW = 4096
"""Numbers of a row of the flat buffers, which the loops of the update sum by rows."""

_MOST_LOGITS = 1 << 24
"""Logits that are in memory at a time; of more rows the output layer takes some at a time."""


class FusedStep(TrainingStep):
    """The step written out."""

    def __init__(self, model: GPT, windows: Windows, config: JobConfig, activations: torch.dtype) -> None:
        """`activations`: type of activations and matrix products. The model's parameters become views of a buffer that
        this step holds."""
        self._windows = windows
        self._config = config
        self._parameters = _Parameters(model, config, activations)
        self._activations = activations
        self._workspaces: dict[int, _Workspace] = {}
        self._n_parts = 0
        self._n_steps = 0
        self.lr = config.lr

    def begin(self) -> None:
        self._n_parts = 0
        self._parameters.forget_gradients()

    def add(self, index: int, windows: Sequence[int], n_targets: int) -> Part:
        B = len(windows)
        if B not in self._workspaces:
            self._workspaces[B] = _Workspace(B, self._windows.length, self._parameters, self._config, self._activations)
        if self._n_parts > 0:
            self._parameters.gather_gradients(is_first=self._n_parts == 1)
        inputs_BT, targets_BT = self._windows.batch(list(windows))
        keys = plane_keys(self._config, index, windows, self._config.seed).view(np.uint32)
        loss = self._workspaces[B].gradient(
            inputs_BT.numpy(),
            targets_BT.flatten().numpy(),
            keys.reshape(*keys.shape[:-1], -1, 2),
            1 / n_targets,
            adds=self._n_parts > 0,
        )
        self._n_parts += 1
        return Part(torch.tensor(loss, dtype=torch.float32), {}, {})

    def update(self) -> Tensor:
        if self._n_parts > 1:
            self._parameters.gather_gradients(is_first=False)
        self._n_steps += 1
        norm = self._parameters.update(self.lr, self._n_steps, is_whole=self._n_parts > 1)
        return torch.tensor(norm, dtype=torch.float32)

    def gradients(self) -> dict[str, Tensor]:
        """The gradient of each parameter since `begin`, in float32."""
        if self._n_parts > 1:
            return {name: view.clone() for name, view in self._parameters.gradient_views.items()}
        return {name: view.float() for name, view in self._parameters.product_gradients.items()}

    def tensors(self) -> dict[str, Tensor]:
        names = self._parameters.views
        steps = {f"step.{name}": torch.tensor(float(self._n_steps)) for name in names}
        return steps | self._parameters.moments()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._n_steps = int(next(tensors[f"step.{name}"] for name in self._parameters.views))
        for name, moment in self._parameters.moments().items():
            moment.copy_(tensors[name])


def _bits(tensor: Tensor) -> Array:
    """The array of a tensor's numbers, or of their bits where numpy has no such type."""
    array: Array = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


class _Parameters:
    """A model's weights, their gradients and moments, as flat buffers in three parts: matrices whose gradient is a
    product; the positions' embeddings, which decay as these do; and vectors, which do not."""

    def __init__(self, model: GPT, config: JobConfig, activations: torch.dtype) -> None:
        self._config = config
        named = dict(model.named_parameters())
        positions = "transformer.wpe.weight"
        parts = [
            [name for name, p in named.items() if decays(name, p) and name != positions],
            [positions],
            [name for name, p in named.items() if not decays(name, p)],
        ]
        places: dict[str, int] = {}
        bounds = [0]
        end = 0
        for part in parts:
            for name in part:
                places[name] = end
                end += -(-named[name].numel() // _ALIGNED) * _ALIGNED
            end = -(-end // _ROW) * _ROW
            bounds.append(end)
        self.weights, self.gradients, self._exp_avg, self._exp_avg_sq = (torch.zeros(end) for _ in range(4))
        products = bounds[1]
        self._is_narrow = activations == torch.bfloat16
        # In bfloat16 the products read a copy of the weights, and leave their gradients as they are computed.
        self._copies, self._part_gradients = (
            torch.zeros(products if self._is_narrow else 0, dtype=torch.bfloat16) for _ in range(2)
        )
        self._products = slice(0, products)
        self._bounds = bounds
        self._places = {name: (places[name], named[name]) for part in parts for name in part}
        self.views = self._view(self.weights, list(places))
        for name, parameter in named.items():
            self.views[name].copy_(parameter.data)
            parameter.data = self.views[name]
            parameter.grad = None
        self.gradient_views = self._view(self.gradients, list(places))
        self.operands, self.product_gradients = self.views, self.gradient_views
        if self._is_narrow:
            self.operands = self.views | self._view(self._copies, parts[0])
            self.product_gradients = self.gradient_views | self._view(self._part_gradients, parts[0])
            update.copy_narrowed(_rows(self.weights[self._products]), _rows(self._copies))

    def _view(self, flat: Tensor, names: list[str]) -> dict[str, Tensor]:
        views = {}
        for name in names:
            place, parameter = self._places[name]
            views[name] = flat[place : place + parameter.numel()].view(parameter.shape)
        return views

    def moments(self) -> dict[str, Tensor]:
        """The averages of each parameter's gradient and squared gradient, by the names under which they are saved."""
        names = list(self._places)
        return {
            f"{key}.{name}": view
            for key, flat in (("exp_avg", self._exp_avg), ("exp_avg_sq", self._exp_avg_sq))
            for name, view in self._view(flat, names).items()
        }

    def vector(self, name: str, w: "_Workspace") -> tuple[Floats, Floats]:
        """A vector and its gradient; zeros, and what nobody reads, where the model has no such bias."""
        if name in self.views:
            return _bits(self.views[name]), _bits(self.gradient_views[name])
        return w.zeros, w.unread

    def forget_gradients(self) -> None:
        """Set to zero what is added to; what is a product's result is overwritten."""
        self.gradients[self._bounds[1] :].zero_()

    def gather_gradients(self, *, is_first: bool) -> None:
        """Add the products' gradients of one micro-batch to those of the step, where they are computed apart."""
        if self._is_narrow:
            whole = self.gradients[self._products]
            if is_first:
                whole.zero_()
            update.accumulate(_rows(self._part_gradients), _rows(whole))

    def update(self, lr: float, step: int, *, is_whole: bool) -> float:
        """AdamW; the gradient's norm. `is_whole`: the step had several micro-batches, whose gradients were gathered."""
        config = self._config
        beta1, beta2 = config.betas
        gradients = [self.gradients[one:other] for one, other in zip(self._bounds, self._bounds[1:], strict=False)]
        if self._is_narrow and not is_whole:
            gradients[0] = self._part_gradients
        clip = 1.0
        if config.grad_clip is not None:
            norm = math.sqrt(sum(update.sum_of_squares(_rows(gradient)) for gradient in gradients))
            clip = min(1.0, config.grad_clip / (norm + 1e-6))
        squares = 0.0
        for part, gradient in enumerate(gradients):
            place = slice(self._bounds[part], self._bounds[part + 1])
            decay = config.weight_decay if part < 2 else 0.0
            rates = update.Rates(
                *map(
                    np.float32,
                    (
                        clip,
                        1 - lr * decay,
                        lr / (1 - beta1**step),
                        math.sqrt(1 - beta2**step),
                        beta1,
                        beta2,
                        config.eps,
                    ),
                )
            )
            squares += update.adamw(
                rates,
                _rows(gradient),
                _rows(self.weights[place]),
                _rows(self._exp_avg[place]),
                _rows(self._exp_avg_sq[place]),
                _rows(self._copies if part == 0 else self._copies[:0]),
            )
        return math.sqrt(squares)


def _rows(flat: Tensor) -> Array:
    return _bits(flat.view(-1, _ROW))


class _Layer:
    """What a layer's products and loops read and write, and what the way back needs of the way there."""

    def __init__(self, layer: int, workspace: "_Workspace", parameters: _Parameters) -> None:
        w = workspace
        prefix = f"transformer.h.{layer}."

        def weight(name: str) -> tuple[Tensor, Tensor, Tensor]:
            """A matrix as products take it, the same transposed, and its gradient."""
            operand = parameters.operands[f"{prefix}{name}.weight"]
            return operand, operand.t(), parameters.product_gradients[f"{prefix}{name}.weight"]

        def vector(name: str) -> tuple[Floats, Floats]:
            return parameters.vector(prefix + name, w)

        self.attn, self.attn_out = weight("attn.c_attn"), weight("attn.c_proj")
        self.mlp_in, self.mlp_out = weight("mlp.c_fc"), weight("mlp.c_proj")
        self.attn_bias, self.d_attn_bias = vector("attn.c_attn.bias")
        self.attn_out_bias, self.d_attn_out_bias = vector("attn.c_proj.bias")
        self.mlp_in_bias, self.d_mlp_in_bias = vector("mlp.c_fc.bias")
        self.mlp_out_bias, self.d_mlp_out_bias = vector("mlp.c_proj.bias")
        self.norm_1 = _Norm(w, *vector("ln_1.weight"), *vector("ln_1.bias"))
        self.norm_2 = _Norm(w, *vector("ln_2.weight"), *vector("ln_2.bias"))
        self.queries, self.keys, self.values = (w.activations(w.B * w.H * w.T, w.D) for _ in range(3))
        self.weights = np.zeros((w.B * w.H * w.T, w.T), np.float32)
        self.attended = w.activations(w.N, w.C)
        self.hidden, self.slope = w.activations(w.N, w.F), w.activations(w.N, w.F)


class _Norm:
    """A layer normalisation: its weights and their gradients, its input and output, and what the way back needs."""

    def __init__(self, w: "_Workspace", weight: Floats, d_weight: Floats, bias: Floats, d_bias: Floats) -> None:
        self.weight, self.d_weight, self.bias, self.d_bias = weight, d_weight, bias, d_bias
        self.x = np.empty((w.N, w.C), np.float32)
        self.out = w.activations(w.N, w.C)
        self.mean, self.scale = np.empty(w.N, np.float32), np.empty(w.N, np.float32)

    def there(self) -> tuple[Floats, Floats, Floats, Array, Floats, Floats]:
        """The last arguments of a loop that ends with this norm."""
        return self.x, self.weight, self.bias, _bits(self.out), self.mean, self.scale

    def back(self) -> tuple[Floats, Floats, Floats, Floats, Floats, Floats]:
        """The arguments of `norm_backward` from `x` on."""
        return self.x, self.mean, self.scale, self.weight, self.d_weight, self.d_bias


class _Workspace:
    """The buffers of a micro-batch of B windows of T tokens, and its way there and back."""

    def __init__(self, B: int, T: int, parameters: _Parameters, config: JobConfig, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.B, self.T, self.C, self.H = B, T, config.n_embd, config.n_head
        self.N, self.D, self.F = B * T, config.n_embd // config.n_head, 4 * config.n_embd
        self.zeros, self.unread = np.zeros(self.F, np.float32), np.zeros(self.F, np.float32)
        self._ones = np.ones(self.N, np.float32)
        self._cut, self._scale = np.uint32(cut(config.dropout)), np.float32(scale(config.dropout))
        self._layers = [_Layer(layer, self, parameters) for layer in range(config.n_layer)]
        views, gradients = parameters.views, parameters.gradient_views
        last = parameters.vector("transformer.ln_f.weight", self), parameters.vector("transformer.ln_f.bias", self)
        self._norm = _Norm(self, *last[0], *last[1])
        self._wte, self._wpe = _bits(views["transformer.wte.weight"]), _bits(views["transformer.wpe.weight"])
        self._d_wpe = _bits(gradients["transformer.wpe.weight"])
        self._out = parameters.operands["transformer.wte.weight"]
        self._d_out = parameters.product_gradients["transformer.wte.weight"]
        V = len(self._out)
        self._logits = self.activations(min(self.N, max(1, _MOST_LOGITS // V)), V)
        # Between two products: one of a width each is enough.
        self._narrow, self._narrow_2, self._scaled = (self.activations(self.N, self.C) for _ in range(3))
        self._wide = self.activations(self.N, self.F)
        self._triple = self.activations(self.N, 3 * self.C)
        heads = self.B * self.H * self.T
        self._heads = [self.activations(heads, self.D) for _ in range(4)]
        self._scores = self.activations(heads, self.T)
        # The loops write the past only: the future stays zero.
        self._dropped, self._d_scores = (torch.zeros(heads, self.T, dtype=dtype) for _ in range(2))
        self._d_x = np.empty((self.N, self.C), np.float32)
        self._d_embedded = np.empty((self.N, self.C), np.float32)
        self._share = np.empty(self.N, np.float32)

    def activations(self, *shape: int) -> Tensor:
        """A buffer in the type of the products."""
        return torch.empty(shape, dtype=self._dtype)

    def gradient(self, inputs_BT: Array, targets_N: Array, keys: Array, share: float, *, adds: bool) -> float:
        """The micro-batch's loss, a sum times `share`, and its gradient: added to what is there if `adds`, except where
        products are in bfloat16."""
        adds = adds and self._dtype == torch.float32
        self._forward(inputs_BT, keys)
        loss = self._output(targets_N, share, adds)
        self._backward(inputs_BT, keys, adds)
        return loss

    def _forward(self, inputs_BT: Array, keys: Array) -> None:
        B, H = self.B, self.H
        narrow, triple, wide, scores, dropped, heads = (
            self._narrow, self._triple, self._wide, self._scores, self._dropped, self._heads[0],
        )  # fmt: skip
        drop = (self._cut, self._scale)
        embedding = keys[EMBEDDING + 1, Site.ATTENTION_OUTPUT]
        first = self._layers[0].norm_1 if self._layers else self._norm
        forward.embed(inputs_BT, self._wte, self._wpe, embedding, *drop, *first.there())
        for n, layer in enumerate(self._layers):
            own = keys[n + 1]
            torch.mm(layer.norm_1.out, layer.attn[1], out=triple)
            split = _bits(layer.queries), _bits(layer.keys), _bits(layer.values)
            forward.split_heads(B, H, _bits(triple), layer.attn_bias, *split)
            torch.bmm(self._by_head(layer.queries), self._by_head(layer.keys).mT, out=self._by_head(scores))
            factor = np.float32(1 / math.sqrt(self.D))
            forward.attend(H, factor, _bits(scores), own[Site.ATTENTION_WEIGHTS], *drop, layer.weights, _bits(dropped))
            torch.bmm(self._by_head(dropped), self._by_head(layer.values), out=self._by_head(heads))
            forward.from_heads(B, H, _bits(heads), _bits(layer.attended))
            torch.mm(layer.attended, layer.attn_out[1], out=narrow)
            forward.add_branch(
                self.T, layer.norm_1.x, _bits(narrow), layer.attn_out_bias, own[Site.ATTENTION_OUTPUT], *drop,
                *layer.norm_2.there(),
            )  # fmt: skip
            torch.mm(layer.norm_2.out, layer.mlp_in[1], out=wide)
            forward.gelu(_bits(wide), layer.mlp_in_bias, _bits(layer.hidden), _bits(layer.slope))
            torch.mm(layer.hidden, layer.mlp_out[1], out=narrow)
            following = self._layers[n + 1].norm_1 if n + 1 < len(self._layers) else self._norm
            forward.add_branch(
                self.T, layer.norm_2.x, _bits(narrow), layer.mlp_out_bias, own[Site.MLP_OUTPUT], *drop,
                *following.there(),
            )  # fmt: skip

    def _output(self, targets_N: Array, share: float, adds: bool) -> float:
        """The loss; the gradient of the output layer, and that of its input but for a factor per row."""
        loss = 0.0
        rows = len(self._logits)
        for first in range(0, self.N, rows):
            part = slice(first, min(first + rows, self.N))
            x, scaled, logits = self._norm.out[part], self._scaled[part], self._logits[: part.stop - first]
            torch.mm(x, self._out.t(), out=logits)
            loss += forward.cross_entropy(
                _bits(logits), targets_N[part], np.float32(share), _bits(x), self._share[part], _bits(scaled)
            )
            _product(logits.t(), scaled, self._d_out, adds=adds or first > 0)
            torch.mm(logits, self._out, out=self._narrow[part])
        return loss

    def _backward(self, inputs_BT: Array, keys: Array, adds: bool) -> None:
        B, T, H, drop = self.B, self.T, self.H, (self._cut, self._scale)
        narrow, branch, wide, triple, scores, d_scores, dropped = (
            self._narrow, self._narrow_2, self._wide, self._triple, self._scores, self._d_scores, self._dropped,
        )  # fmt: skip
        factor = np.float32(1 / math.sqrt(self.D))
        d_x = self._d_x
        d_x.fill(0)
        d_heads, d_queries, d_keys, d_values = self._heads
        norm, share = self._norm, self._share
        for n in reversed(range(len(self._layers))):
            layer, own = self._layers[n], keys[n + 1]
            backward.norm_backward(
                T, _bits(narrow), share, *norm.back(), d_x, own[Site.MLP_OUTPUT], *drop, _bits(branch),
                layer.d_mlp_out_bias,
            )  # fmt: skip
            _product(branch.t(), layer.hidden, layer.mlp_out[2], adds=adds)
            torch.mm(branch, layer.mlp_out[0], out=wide)
            backward.gelu_backward(_bits(wide), _bits(layer.slope), layer.d_mlp_in_bias)
            _product(wide.t(), layer.norm_2.out, layer.mlp_in[2], adds=adds)
            torch.mm(wide, layer.mlp_in[0], out=narrow)
            backward.norm_backward(
                T, _bits(narrow), self._ones, *layer.norm_2.back(), d_x, own[Site.ATTENTION_OUTPUT], *drop,
                _bits(branch), layer.d_attn_out_bias,
            )  # fmt: skip
            _product(branch.t(), layer.attended, layer.attn_out[2], adds=adds)
            torch.mm(branch, layer.attn_out[0], out=narrow)
            forward.to_heads(B, H, _bits(narrow), _bits(d_heads))
            d_out, queries, at_keys, values = map(self._by_head, (d_heads, layer.queries, layer.keys, layer.values))
            torch.bmm(d_out, values.mT, out=self._by_head(scores))
            backward.attend_backward(
                H, factor, _bits(scores), layer.weights, own[Site.ATTENTION_WEIGHTS], *drop, _bits(d_scores),
                _bits(dropped),
            )  # fmt: skip
            torch.bmm(self._by_head(dropped).mT, d_out, out=self._by_head(d_values))
            torch.bmm(self._by_head(d_scores), at_keys, out=self._by_head(d_queries))
            torch.bmm(self._by_head(d_scores).mT, queries, out=self._by_head(d_keys))
            backward.join_heads(
                B, H, _bits(d_queries), _bits(d_keys), _bits(d_values), _bits(triple), layer.d_attn_bias
            )
            _product(triple.t(), layer.norm_1.out, layer.attn[2], adds=adds)
            torch.mm(triple, layer.attn[0], out=narrow)
            norm, share = layer.norm_1, self._ones
        backward.norm_backward(
            T, _bits(narrow), share, *norm.back(), d_x, keys[EMBEDDING + 1, Site.ATTENTION_OUTPUT], *drop,
            self._d_embedded, self.unread,
        )  # fmt: skip
        backward.embed_backward(inputs_BT, self._d_embedded, _bits(self._d_out), self._d_wpe)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.view(self.B * self.H, self.T, -1)


def _product(one: Tensor, other: Tensor, out: Tensor, *, adds: bool) -> None:
    """out = one @ other, or out += it."""
    if adds:
        torch.addmm(out, one, other, out=out)
    else:
        torch.mm(one, other, out=out)
