"""The forward pass of an evaluation on a CPU written out: products by torch into buffers that stay, everything between
them in compiled loops. It computes what `nanomoe.evaluation.reader.PlainReader` computes.

Windows are read in batches of one size, each by one thread: no bit depends on how many threads there are, or on which
of them reads what. Logits are never all in memory: the output layer takes some of the vocabulary at a time.

Shape letters as in `nanomoe.training.steps.loops`; R = B * H * T rows of the attention's matrices, E experts, K of them
for each token, S shared ones, A = N * K assignments.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import wait as wait_for
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanomoe.compiling import Array, Floats, thread_pool
from nanomoe.config import ModelConfig
from nanomoe.data import Windows
from nanomoe.evaluation.evaluated_text import RaiseIfStopped, go_on
from nanomoe.evaluation.moe_metrics import LayerRouting
from nanomoe.evaluation.reader import Reader, Reading
from nanomoe.model.gpt import GPT
from nanomoe.training.steps.loops import expert_rows, forward, reading, routing

Result = TypeVar("Result")

_TOKENS = 512
"""Tokens that a thread reads together, or those of a window, if it has more."""

_TILE = 512
"""Entries of the vocabulary whose logits are in memory at a time: with 512 tokens, a megabyte."""


class FusedReader(Reader):
    """The pass written out. As many threads read as torch may take in the thread that calls."""

    def __init__(self, model: GPT) -> None:
        self._model = model

    def read(self, windows: Windows, chosen: Sequence[int], raise_if_stopped: RaiseIfStopped = go_on) -> Reading:
        parts = self._of_batches(windows, chosen, raise_if_stopped, _Pass.read)
        losses = [loss for part in parts for loss in part.losses]
        return Reading(
            windows=list(chosen),
            n_targets=[windows.n_targets([window]) for window in chosen],
            losses=losses,
            total=sum(losses),
            predicted=[token for part in parts for token in part.predicted],
            routing={
                layer: LayerRouting.join([part.routing[layer] for part in parts]) for layer in self._model.moe_layers
            },
        )

    def losses_without(
        self, windows: Windows, chosen: Sequence[int], raise_if_stopped: RaiseIfStopped = go_on
    ) -> dict[int, list[float]]:
        parts = self._of_batches(windows, chosen, raise_if_stopped, _Pass.losses_without)
        n_targets = windows.n_targets(list(chosen))
        return {
            layer: [sum(of_expert) / n_targets for of_expert in zip(*(part[layer] for part in parts), strict=True)]
            for layer in self._model.moe_layers
        }

    def _of_batches(
        self,
        windows: Windows,
        chosen: Sequence[int],
        raise_if_stopped: RaiseIfStopped,
        work: Callable[["_Pass", Array, Array], Result],
    ) -> list[Result]:
        """What `work` makes of the inputs (B, T) and targets (N,) of every batch of windows, in their order."""
        size = max(1, _TOKENS // windows.length)
        batches = [list(chosen[first : first + size]) for first in range(0, len(chosen), size)]
        left = deque(range(len(batches)))
        done: dict[int, Result] = {}

        def read_rest(before_each: RaiseIfStopped) -> None:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                of_thread = _Pass(self._model, min(size, len(chosen)), windows.length)
                while True:
                    before_each()
                    try:
                        number = left.popleft()
                    except IndexError:
                        return
                    inputs_BT, targets_BT = windows.batch(batches[number])
                    done[number] = work(of_thread, inputs_BT.numpy(), targets_BT.flatten().numpy())
            finally:
                torch.set_num_threads(threads)

        n_others = min(torch.get_num_threads(), len(batches)) - 1
        others = [thread_pool().submit(read_rest, go_on) for _ in range(n_others)]
        try:
            read_rest(raise_if_stopped)
        finally:
            left.clear()
            wait_for(others)
        for other in others:
            other.result()
        return [done[number] for number in range(len(batches))]


class _Part(NamedTuple):
    """What one batch of windows contributes to a `Reading`."""

    losses: list[float]
    predicted: list[int]
    routing: dict[int, LayerRouting]


class _Norm(NamedTuple):
    """Weights of a layer normalisation."""

    weight: Floats
    bias: Floats


class _Pass:
    """The weights of a model as loops and products take them, and the buffers of a batch of at most B windows."""

    def __init__(self, model: GPT, B: int, T: int) -> None:
        self._config = config = model.config
        self._T, self._C, self._H = T, config.n_embd, config.n_head
        self._factor = np.float32(1 / math.sqrt(self._C // self._H))
        self._weights = {name: each.detach() for name, each in (*model.named_parameters(), *model.named_buffers())}
        layers = range(config.n_layer)
        names = [f"transformer.h.{layer}.{norm}" for layer in layers for norm in ("ln_1", "ln_2")]
        self._norms = [self._norm(name) for name in (*names, "transformer.ln_f")]
        """Two of each layer, and the last."""
        N, C = B * T, self._C
        self._x, self._normed, self._narrow, self._attended, self._before = (torch.zeros(N, C) for _ in range(5))
        self._triple = torch.zeros(N, 3 * C)
        self._queries, self._keys, self._values, self._heads = (
            torch.zeros(N * self._H, C // self._H) for _ in range(4)
        )
        self._scores = torch.zeros(N * self._H, T)
        self._wide = torch.zeros(N, 4 * C)
        self._tile = torch.zeros(N * _TILE)
        self._mixture = _Mixture(config, N) if config.use_moe else None
        self._n = N
        """Rows of the batch at hand."""

    def read(self, inputs_BT: Array, targets_N: Array) -> _Part:
        """The losses, predictions and routing of a batch."""
        self._embed(inputs_BT)
        counted_N = torch.from_numpy(targets_N >= 0)
        routing: dict[int, LayerRouting] = {}
        for layer in range(self._config.n_layer):
            mixture = self._block(layer)
            if mixture is not None:
                tokens = mixture.chosen(self._n), mixture.probabilities(self._n), mixture.logits(self._n)
                routing[layer] = LayerRouting.of_tokens(*(each[counted_N] for each in tokens))
        losses_N, predicted_N = self._output(targets_N)
        counted = targets_N >= 0
        return _Part(losses_N[counted].tolist(), predicted_N[counted].tolist(), routing)

    def losses_without(self, inputs_BT: Array, targets_N: Array) -> dict[int, list[float]]:
        """{MoE layer: sum of the batch's losses with the output of expert e removed, for each e}."""
        self._embed(inputs_BT)
        losses: dict[int, list[float]] = {}
        for layer in range(self._config.n_layer):
            self._attention(layer)
            if self._config.is_moe_layer(layer):
                losses[layer] = self._losses_without_each(layer, targets_N)
            else:
                self._feed_forward(layer)
        return losses

    def _losses_without_each(self, layer: int, targets_N: Array) -> list[float]:
        """Go on from a mixture's layer without each of its experts, and at last with all of them, to the next layer."""
        n, mixture = self._n, self._mixture
        assert mixture is not None
        mixture.run(self._weights, layer, self._normed[:n])
        before, x = self._before[:n], self._x[:n]
        before.copy_(x)
        branches = [torch.empty_like(x) for _ in range(self._config.n_experts)]
        for expert, branch in enumerate(branches):
            mixture.combine(self._weights, layer, branch, without=expert)
        mixture.combine(self._weights, layer, self._narrow[:n])
        with_all = self._narrow[:n].clone()
        losses = []
        for branch in branches:
            x.copy_(before)
            self._add(branch, None, 2 * layer + 2)
            for later in range(layer + 1, self._config.n_layer):
                self._block(later)
            losses.append(float(self._output(targets_N)[0].sum(dtype=np.float64)))
        x.copy_(before)
        self._add(with_all, None, 2 * layer + 2)
        return losses

    def _embed(self, inputs_BT: Array) -> None:
        self._n = inputs_BT.size
        wte, wpe = (self._weights[f"transformer.{name}.weight"].numpy() for name in ("wte", "wpe"))
        reading.embed(inputs_BT, wte, wpe, self._x[: self._n].numpy(), *self._norms[0], self._normed[: self._n].numpy())

    def _block(self, layer: int) -> "_Mixture | None":
        """The layer, whose norm has been taken; its mixture, if it has one, as it is after the pass."""
        self._attention(layer)
        return self._feed_forward(layer)

    def _attention(self, layer: int) -> None:
        n, T, H = self._n, self._T, self._H
        name = f"transformer.h.{layer}.attn"
        triple, attended, narrow = self._triple[:n], self._attended[:n], self._narrow[:n]
        torch.mm(self._normed[:n], self._weights[f"{name}.c_attn.weight"].t(), out=triple)
        matrices = [each[: n * H] for each in (self._queries, self._keys, self._values)]
        arrays = (each.numpy() for each in matrices)
        forward.split_heads(0, n, T, H, triple.numpy(), self._vector(f"{name}.c_attn.bias", 3 * self._C), *arrays)
        queries, keys, values = (each.view(n * H // T, T, -1) for each in matrices)
        scores, heads = self._scores[: n * H], self._heads[: n * H]
        torch.bmm(queries, keys.mT, out=scores.view(-1, T, T))
        reading.attend(self._factor, scores.numpy())
        torch.bmm(scores.view(-1, T, T), values, out=heads.view_as(values))
        forward.from_heads(0, n, T, H, heads.numpy(), attended.numpy())
        torch.mm(attended, self._weights[f"{name}.c_proj.weight"].t(), out=narrow)
        self._add(narrow, f"{name}.c_proj.bias", 2 * layer + 1)

    def _feed_forward(self, layer: int) -> "_Mixture | None":
        n, narrow, mixture = self._n, self._narrow[: self._n], self._mixture
        if mixture is not None and self._config.is_moe_layer(layer):
            mixture.run(self._weights, layer, self._normed[:n])
            mixture.combine(self._weights, layer, narrow)
            self._add(narrow, None, 2 * layer + 2)
            return mixture
        name, wide = f"transformer.h.{layer}.mlp", self._wide[:n]
        torch.mm(self._normed[:n], self._weights[f"{name}.c_fc.weight"].t(), out=wide)
        reading.gelu(wide.numpy(), self._vector(f"{name}.c_fc.bias", 4 * self._C))
        torch.mm(wide, self._weights[f"{name}.c_proj.weight"].t(), out=narrow)
        self._add(narrow, f"{name}.c_proj.bias", 2 * layer + 2)
        return None

    def _output(self, targets_N: Array) -> tuple[Floats, Array]:
        """The loss of each target, 0 where it is ignored, and the likeliest token in its place."""
        n, wte = self._n, self._weights["transformer.wte.weight"]
        largest_N, total_N, wanted_N = np.full(n, -np.inf, np.float32), *np.zeros((2, n), np.float32)
        predicted_N = np.zeros(n, np.int64)
        for first in range(0, len(wte), _TILE):
            entries = wte[first : first + _TILE]
            logits = self._tile[: n * len(entries)].view(n, -1)
            torch.mm(self._normed[:n], entries.t(), out=logits)
            reading.softmax_so_far(logits.numpy(), first, targets_N, largest_N, total_N, wanted_N, predicted_N)
        losses_N = np.log(total_N) - (wanted_N - largest_N)
        return np.where(targets_N >= 0, losses_N, np.float32(0)), predicted_N

    def _add(self, branch: Tensor, bias: str | None, norm: int) -> None:
        """Add a branch and its bias to the residual stream, and take the norm of this number."""
        x, out = self._x[: self._n].numpy(), self._normed[: self._n].numpy()
        reading.add_branch(x, branch.numpy(), self._vector(bias, self._C), *self._norms[norm], out)

    def _norm(self, name: str) -> _Norm:
        return _Norm(self._weights[f"{name}.weight"].numpy(), self._vector(f"{name}.bias", self._C))

    def _vector(self, name: str | None, *shape: int) -> Floats:
        return _vector(self._weights, name, *shape)


def _vector(weights: dict[str, Tensor], name: str | None, *shape: int) -> Floats:
    """A vector, or a stack of them; zeros where the model has none by this name."""
    vector: Floats = weights[name].numpy() if name in weights else np.zeros(shape, np.float32)
    return vector


class _Mixture:
    """Router and experts of one layer after another, for at most N rows; nothing is dropped."""

    def __init__(self, config: ModelConfig, N: int) -> None:
        self._config = config
        A, E, K, C, F = N * config.k, config.n_experts, config.k, config.n_embd, config.expert_hidden
        SN = N * config.n_shared_experts
        self._logits, self._scores = np.zeros((N, E), np.float32), np.zeros((N, E), np.float32)
        self._chosen, self._slots = np.zeros((N, K), np.int64), np.zeros((N, K), np.int64)
        self._gates = np.zeros((N, K), np.float32)
        self._counts, self._starts = np.zeros(E, np.int64), np.zeros(E + 1, np.int64)
        self._tokens = np.zeros(A, np.int64)
        self._rows, self._out, self._shared_out = torch.zeros(A, C), torch.zeros(A, C), torch.zeros(SN, C)
        self._wide = torch.zeros(max(A, SN and N), F)

    def chosen(self, n: int) -> Tensor:
        """(n, K) int64: the experts of the first rows."""
        return torch.from_numpy(self._chosen[:n])

    def logits(self, n: int) -> Tensor:
        """(n, E): the router's logits."""
        return torch.from_numpy(self._logits[:n])

    def probabilities(self, n: int) -> Tensor:
        """(n, E): scores as probabilities."""
        scores = torch.from_numpy(self._scores[:n])
        return scores if self._config.router_score == "softmax" else scores / scores.sum(-1, keepdim=True)

    def run(self, weights: dict[str, Tensor], layer: int, x: Tensor) -> None:
        """Route the rows of `x` and run the experts of each."""
        config, n, name = self._config, len(x), f"transformer.h.{layer}.mlp"
        logits, scores, gates = self._logits[:n], self._scores[:n], self._gates[:n]
        chosen, slots = self._chosen[:n], self._slots[:n]
        torch.mm(x, weights[f"{name}.router.weight"].t(), out=torch.from_numpy(logits))
        bias = _vector(weights, f"{name}.router.balance_bias", config.n_experts)
        is_sigmoid = config.router_score == "sigmoid"
        routing.route(logits, is_sigmoid, bias, config.renormalises_gates, scores, chosen, gates, self._counts)
        n_rows = routing.assign(chosen, self._counts, n * config.k, self._starts, slots, self._tokens)
        expert_rows.gather(0, n_rows, x.numpy(), self._tokens, self._rows.numpy())
        for expert, bounds in enumerate(pairwise(self._starts.tolist())):
            rows = slice(*bounds)
            self._run_expert(weights, f"{name}.experts", expert, self._rows[rows], self._out[rows])
        for expert in range(config.n_shared_experts):
            out = self._shared_out[expert * n : (expert + 1) * n]
            self._run_expert(weights, f"{name}.shared", expert, x, out)

    def combine(self, weights: dict[str, Tensor], layer: int, out: Tensor, *, without: int = -1) -> None:
        """Set `out` to the outputs of each row's experts, weighted and summed up; those of one may be left out."""
        config, n, name = self._config, len(out), f"transformer.h.{layer}.mlp"
        biases = [
            _vector(weights, f"{name}.{kind}.b_out", n_experts, config.n_embd)
            for kind, n_experts in (("experts", config.n_experts), ("shared", config.n_shared_experts))
        ]
        reading.combine(
            self._out.numpy(), biases[0], self._chosen[:n], self._slots[:n], self._gates[:n],
            self._shared_out.numpy(), biases[1], without, out.numpy(),
        )  # fmt: skip

    def _run_expert(self, weights: dict[str, Tensor], name: str, expert: int, x: Tensor, out: Tensor) -> None:
        if len(x):
            w_in, w_out = weights[f"{name}.w_in"][expert], weights[f"{name}.w_out"][expert]
            wide = self._wide[: len(x)]
            torch.mm(x, w_in, out=wide)
            bias = weights.get(f"{name}.b_in")
            reading.gelu(wide.numpy(), _vector({}, None, wide.shape[1]) if bias is None else bias[expert].numpy())
            torch.mm(wide, w_out, out=out)
