"""The hidden states of a checkpoint's model, computed for generation: many sequences at once, cached keys and values.

Three ways to the same numbers: `prefill` runs whole windows, `step` adds one token to each cached sequence with as few
tensor operations as possible, and `exact` runs one window alone in float64. The first two are float32, and their last
bits change with the number of rows that share a product. So the decoder also says how far its float32 can be from
`exact`: `error` bounds the hidden state, and a row for which two experts are too close to call is reported as not
certain. Both bounds are the largest difference seen on probe windows when the weights are loaded, times `SAFETY`.

Shape letters: N sequences, T tokens of a window, R rows of the cache, L cached positions, B = block_size, C channels,
H heads, D = C / H, E experts, K experts of a token, V vocabulary. Knows no sampling and no requests.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from nanomoe.config import ModelConfig
from nanomoe.graphs import GraphedStep
from nanomoe.model.moe import SATURATED

if TYPE_CHECKING:
    from nanomoe.kernels.step import Loops

SAFETY = 100.0
"""How many times the largest error seen on the probes is taken as the bound. Assumed; a wider bound costs only time."""

_MOST_EVERYWHERE = 1024
"""On a GPU: tokens up to which every expert computes all of them and nobody waits to know who chose whom. Assumed."""

_PROBES = 2
_PROBE_TOKENS = 256
_STEPPED = 16
"""Tokens at the end of a probe that are computed one by one as well."""
_STRIDE = 32
"""Cached positions are read in multiples of this, so that few different shapes occur."""


class _Experts:
    """Stacked MLPs: w_in (E, C, F), b_in (E, F), w_out (E, F, C), b_out (E, C)."""

    def __init__(self, weights: Mapping[str, Tensor], prefix: str) -> None:
        self.w_in, self.w_out = weights[prefix + "w_in"], weights[prefix + "w_out"]
        self.b_in, self.b_out = weights.get(prefix + "b_in"), weights.get(prefix + "b_out")

    def one(self, expert: int, x_NC: Tensor) -> Tensor:
        """(N, C): one expert's output."""
        dtype = x_NC.dtype
        first = _cast((self.w_in[expert], None if self.b_in is None else self.b_in[expert]), dtype)
        second = _cast((self.w_out[expert], None if self.b_out is None else self.b_out[expert]), dtype)
        return _linear(F.gelu(_linear(x_NC, *first)), *second)

    def chosen(self, chosen_NK: Tensor, x_NC: Tensor) -> Tensor:
        """(N, K, C): each token's own experts. Every shape is known before the choice, as a captured graph needs."""

        def of(weight: Tensor | None) -> Tensor:
            return x_NC.new_zeros(1, 1) if weight is None else weight.to(x_NC.dtype)

        N, K = chosen_NK.shape
        if len(self.w_in) >= N * K:  # copies of so few experts are smaller than what all would compute
            hidden_NK1F = torch.matmul(x_NC[:, None, None], of(self.w_in)[chosen_NK])
            hidden_NK1F += 0 if self.b_in is None else of(self.b_in)[chosen_NK][:, :, None]
            out_NKC = torch.matmul(F.gelu(hidden_NK1F), of(self.w_out)[chosen_NK])[:, :, 0]
            return out_NKC if self.b_out is None else out_NKC + of(self.b_out)[chosen_NK]
        hidden_ENF = torch.matmul(x_NC, of(self.w_in)) + of(self.b_in)[:, None]
        out_ENC = torch.matmul(F.gelu(hidden_ENF), of(self.w_out)) + of(self.b_out)[:, None]
        return out_ENC[chosen_NK, torch.arange(N, device=x_NC.device)[:, None]]


@dataclass(frozen=True)
class _Layer:
    """One block's weights. Products are laid out (in, out)."""

    ln_1: tuple[Tensor, Tensor | None]
    attn: tuple[Tensor, Tensor | None]
    """(C, 3C), its columns grouped by head: the query, key and value of head 0, then of head 1."""
    attn_out: tuple[Tensor, Tensor | None]
    ln_2: tuple[Tensor, Tensor | None]
    mlp: tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]] | None
    """None where there are experts."""
    router_CE: Tensor | None
    balance_bias_E: Tensor | None
    experts: _Experts | None
    shared: _Experts | None


def _linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return torch.mm(x, w) if b is None else torch.addmm(b, x, w)


def _norm(x: Tensor, weights: tuple[Tensor, Tensor | None]) -> Tensor:
    return torch.layer_norm(x, weights[0].shape, *weights, 1e-5)


class Decoder:
    """One checkpoint's weights in float32, and a cache of `n_rows` sequences, rows 0 to n_rows - 1."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        config: ModelConfig,
        device: torch.device | str = "cpu",
        n_rows: int = 1,
        *,
        compiled: bool = False,
    ) -> None:
        """`weights`: the model's parameters and buffers by nanoGPT's names, any float type. `compiled`: whether a step
        is done by compiled loops (`nanomoe.kernels`), or on a GPU by captured graphs, for many steps to come.

        Raises:
            ValueError: a weight is not finite.
        """
        for name, tensor in weights.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} is not finite")
        self.config = config
        self.device = torch.device(device)
        self._head_dim = config.n_embd // config.n_head
        self._saturated = SATURATED if config.router_score == "sigmoid" else math.inf
        weights = {name: tensor.detach().to(self.device, torch.float32) for name, tensor in weights.items()}
        self.wte_VC = weights["transformer.wte.weight"].contiguous()
        self._wpe_BC = weights["transformer.wpe.weight"]
        self._ln_f = self._pair(weights, "transformer.ln_f")
        self._layers = [self._layer(weights, layer) for layer in range(config.n_layer)]
        self._loops: Loops | None = None
        if compiled and self.device.type == "cpu":
            from nanomoe.kernels import step

            self._loops = step.Loops(weights, config)
        self._positions_B = torch.arange(_round_up(config.block_size), device=self.device)
        self._seen = torch.zeros((), device=self.device)
        self._unseen = torch.full((), -math.inf, device=self.device)
        self._graphed: GraphedStep | None = None
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = False  # some containers allow it; error bounds are float32's
            self._graphed = GraphedStep(self.device) if compiled else None
        self.n_rows = 0
        self._kept_views: list[tuple[Tensor, Tensor, Tensor]] = []
        self._cache = torch.empty(config.n_layer, 0, 0, 0)
        """(L, R * H, B, 2 D), L layers: keys and values side by side."""
        self.reserve(n_rows)
        self._router_error = 0.0
        self.error, self._router_error = self._measure_errors()
        self._cache.zero_()

    def _pair(self, weights: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor | None]:
        return weights[name + ".weight"], weights.get(name + ".bias")

    def _layer(self, weights: Mapping[str, Tensor], layer: int) -> _Layer:
        prefix = f"transformer.h.{layer}."

        def transposed(name: str) -> tuple[Tensor, Tensor | None]:
            weight, bias = self._pair(weights, prefix + name)
            return weight.T.contiguous(), bias

        n_head, C = self.config.n_head, self.config.n_embd
        order = torch.arange(3 * C, device=self.device).view(3, n_head, -1).transpose(0, 1).flatten()
        w_attn, b_attn = self._pair(weights, prefix + "attn.c_attn")
        is_moe = self.config.is_moe_layer(layer)
        has_shared = is_moe and self.config.n_shared_experts > 0
        return _Layer(
            ln_1=self._pair(weights, prefix + "ln_1"),
            attn=(w_attn[order].T.contiguous(), None if b_attn is None else b_attn[order]),
            attn_out=transposed("attn.c_proj"),
            ln_2=self._pair(weights, prefix + "ln_2"),
            mlp=None if is_moe else (transposed("mlp.c_fc"), transposed("mlp.c_proj")),
            router_CE=weights[prefix + "mlp.router.weight"].T.contiguous() if is_moe else None,
            balance_bias_E=weights.get(prefix + "mlp.router.balance_bias") if is_moe else None,
            experts=_Experts(weights, prefix + "mlp.experts.") if is_moe else None,
            shared=_Experts(weights, prefix + "mlp.shared.") if has_shared else None,
        )

    @property
    def n_bytes(self) -> int:
        """Memory of the weights and the cache."""
        tensors = [self.wte_VC, self._wpe_BC, self._cache]
        for layer in self._layers:
            for pair in (layer.attn, layer.attn_out, *(layer.mlp or ())):
                tensors += [tensor for tensor in pair if tensor is not None]
            for experts in (layer.experts, layer.shared):
                tensors += [] if experts is None else [experts.w_in, experts.w_out]
        return sum(tensor.nbytes for tensor in tensors) + (0 if self._loops is None else self._loops.n_bytes)

    @property
    def way(self) -> str:
        """How a step is done, in words."""
        if self._loops is not None:
            return "compiled loops"
        return "tensor operations" if self._graphed is None else "a captured CUDA graph"

    @property
    def row_bytes(self) -> int:
        """Memory of one cached sequence."""
        n_positions = _round_up(self.config.block_size)
        return self.config.n_layer * 2 * self.config.n_embd * self._wpe_BC.itemsize * n_positions

    def reserve(self, n_rows: int) -> None:
        """Make room for `n_rows` cached sequences; those that are cached stay."""
        if n_rows <= self.n_rows:
            return
        H, B, D = self.config.n_head, _round_up(self.config.block_size), self._head_dim
        # Zeros, not empty: positions that a mask hides are still multiplied, and 0 * NaN is NaN.
        grown = torch.zeros(self.config.n_layer, n_rows * H, B, 2 * D, device=self.device)
        if self.n_rows:
            grown[:, : self.n_rows * H] = self._cache
        self._cache, self.n_rows = grown, n_rows
        self._viewed: tuple[int, int] | None = None
        self._kept_views.clear()  # they would keep the old cache alive
        if self._graphed is not None:
            self._graphed.forget()
        self._first_slot_RH = torch.arange(n_rows * H, device=self.device).view(n_rows, H) * B

    def move(self, source: int, target: int) -> None:
        """Copy a cached sequence from one row to another."""
        H = self.config.n_head
        self._cache[:, target * H : (target + 1) * H] = self._cache[:, source * H : (source + 1) * H]

    # One token for each cached sequence

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> tuple[Tensor, list[bool]]:
        """Append one token to each of the cached rows 0 to N - 1.

        Args:
            tokens: the token of each row.
            positions: its position, which is the number of tokens that the row holds already; below block_size.

        Returns:
            The hidden states (N, C) after the last norm, and for each row whether this token's routing is certain.
        """
        assert self.n_rows >= len(tokens), f"{len(tokens)} sequences in a cache of {self.n_rows} rows"
        if self._loops is not None:
            return self._loops.step(tokens, positions, self._cache, self._router_error)
        length = _round_up(max(positions) + 1)
        if self._graphed is not None:
            n_rows = min(1 << (len(tokens) - 1).bit_length(), self.n_rows)
            hidden_NC, wanted = self._graphed(self._advance, tokens, positions, length, n_rows=n_rows)
        else:
            tokens_N, positions_N = torch.tensor([tokens, positions], device=self.device)
            hidden_NC, wanted = self._advance(tokens_N, positions_N, length)
        return hidden_NC, self._certain(wanted, len(tokens))

    def _advance(self, tokens_N: Tensor, positions_N: Tensor, length: int) -> tuple[Tensor, list[Tensor]]:
        """One token for each row, reading `length` cached positions: hidden states (N, C), and by what each MoE layer
        chose its experts (N, E)."""
        N, H, D, C = len(tokens_N), self.config.n_head, self._head_dim, self.config.n_embd
        unseen_NL = self._positions_B[:length] > positions_N[:, None]
        mask = torch.where(unseen_NL, self._unseen, self._seen)[:, None]  # (N, 1, L), added to the scores
        if N > 1:
            mask = mask.repeat_interleave(H, 0)  # (N * H, 1, L)
        slots = (self._first_slot_RH[:N] + positions_N[:, None]).flatten()  # (N * H,)
        scale = 1 / math.sqrt(D)
        x_NC = torch.embedding(self.wte_VC, tokens_N) + torch.embedding(self._wpe_BC, positions_N)
        wanted: list[Tensor] = []
        for layer, (all_slots, keys, values) in zip(self._layers, self._views(N, length), strict=True):
            qkv = _linear(_norm(x_NC, layer.ln_1), *layer.attn).view(N * H, 3 * D)
            queries, new = qkv[:, None, :D], qkv[:, D:]
            all_slots.index_copy_(0, slots, new)
            scores = torch.baddbmm(mask, queries, keys, alpha=scale)  # (N * H, 1, L)
            attended_NC = torch.bmm(scores.softmax(-1), values).view(N, C)
            x_NC += _linear(attended_NC, *layer.attn_out)
            x_NC += self._mlp(layer, _norm(x_NC, layer.ln_2), wanted)
        return _norm(x_NC, self._ln_f), wanted

    def _views(self, n_rows: int, length: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per layer: all slots (R * H * B, 2 D), and of the first rows the keys (N * H, D, L) and values (N * H, L, D).

        Kept for the next step, which is nearly always of the same shape: making them costs as much as using them.
        """
        if self._viewed != (n_rows, length):
            D = self._head_dim
            self._viewed, self._kept_views = (n_rows, length), []
            for cache in self._cache:
                cached = cache[: n_rows * self.config.n_head, :length]
                self._kept_views.append((cache.view(-1, 2 * D), cached[..., :D].transpose(1, 2), cached[..., D:]))
        return self._kept_views

    # Whole windows

    def prefill(self, windows: Sequence[Sequence[int]], rows: Sequence[int] | None = None) -> tuple[Tensor, list[bool]]:
        """Run windows of at most block_size tokens, each from position 0.

        Args:
            windows: their tokens.
            rows: where in the cache each one's keys and values go; None keeps none.

        Returns:
            The hidden state (N, C) of each window's last token after the last norm, and whether its routing, and that
            of all tokens before it, is certain.
        """
        # A token after the window's end cannot change what comes before it, but it can make routing look uncertain.
        hidden_NTC, wanted = self._forward(windows, torch.float32, rows)
        N, T, _ = hidden_NTC.shape
        certain_NT = self._certain(wanted, N * T)
        certain = [all(certain_NT[n * T : n * T + len(window)]) for n, window in enumerate(windows)]
        last_N = torch.tensor([len(window) - 1 for window in windows], device=self.device)
        return hidden_NTC[torch.arange(N, device=self.device), last_N], certain

    def exact(self, window: Sequence[int], row: int | None = None) -> Tensor:
        """The hidden state (C,) of a window's last token in float64, computed alone: a function of the window only.

        `row`: where its keys and values, rounded to float32, replace those that are cached; None keeps none.
        """
        return self._forward([window], torch.float64, None if row is None else [row])[0][0, -1]

    def _forward(
        self, windows: Sequence[Sequence[int]], dtype: torch.dtype, rows: Sequence[int] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Hidden states (N, T, C), and by what each MoE layer chose its experts (N * T, E)."""
        N, T = len(windows), max(len(window) for window in windows)
        H, D, C = self.config.n_head, self._head_dim, self.config.n_embd
        assert 0 < T <= self.config.block_size, f"a window of {T} tokens"
        tokens_NT = torch.tensor([[*window, *[0] * (T - len(window))] for window in windows], device=self.device)
        x_NTC = F.embedding(tokens_NT, self.wte_VC).to(dtype) + self._wpe_BC[:T].to(dtype)
        wanted: list[Tensor] = []
        for layer, cache in zip(self._layers, self._cache, strict=True):
            normed = _norm(x_NTC, _cast(layer.ln_1, dtype)).view(-1, C)
            qkv_NHTD = _linear(normed, *_cast(layer.attn, dtype)).view(N, T, H, 3 * D).transpose(1, 2)
            for n, row in enumerate(rows or ()):
                cache[row * H : (row + 1) * H, : len(windows[n])] = qkv_NHTD[n, :, : len(windows[n]), D:]
            q, k, v = torch.split(qkv_NHTD, D, -1)
            attended_NHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            attended = attended_NHTD.transpose(1, 2).reshape(-1, C)
            x_NTC = x_NTC + _linear(attended, *_cast(layer.attn_out, dtype)).view(N, T, C)
            normed = _norm(x_NTC, _cast(layer.ln_2, dtype)).view(-1, C)
            x_NTC = x_NTC + self._mlp(layer, normed, wanted).view(N, T, C)
        return _norm(x_NTC, _cast(self._ln_f, dtype)), wanted

    # MLPs and experts

    def _mlp(self, layer: _Layer, x_NC: Tensor, wanted: list[Tensor]) -> Tensor:
        """(N, C): the MLP, or the experts without capacity, which append (N, E) by what they are chosen to `wanted`."""
        dtype = x_NC.dtype
        if layer.mlp is not None:
            w_in, w_out = layer.mlp
            return _linear(F.gelu(_linear(x_NC, *_cast(w_in, dtype))), *_cast(w_out, dtype))
        assert layer.router_CE is not None
        assert layer.experts is not None
        logits_NE = torch.mm(x_NC, layer.router_CE.to(dtype))
        scores_NE = logits_NE.softmax(-1) if self.config.router_score == "softmax" else logits_NE.sigmoid()
        # The law is the order of the scores, with the bias where there is one. Without, logits tell it better than
        # rounded scores, which crowd together near 0 and 1.
        law_NE = scores_NE if layer.balance_bias_E is None else scores_NE + layer.balance_bias_E.to(dtype)
        wanted_NE = law_NE if layer.balance_bias_E is not None else logits_NE.clamp(max=self._saturated)
        wanted.append(wanted_NE)
        ranking_NE = law_NE if dtype == torch.float64 else wanted_NE
        chosen_NK = ranking_NE.sort(dim=-1, descending=True, stable=True).indices[:, : self.config.k]
        gates_NK = scores_NE.gather(1, chosen_NK)
        if self.config.renormalises_gates:
            gates_NK = gates_NK / gates_NK.sum(-1, keepdim=True)
        y_NC = torch.zeros_like(x_NC)
        if x_NC.device.type == "cuda" and len(x_NC) <= _MOST_EVERYWHERE:
            y_NC += (gates_NK[..., None] * layer.experts.chosen(chosen_NK, x_NC)).sum(1)
        elif len(x_NC) == 1:
            for slot, expert in enumerate(chosen_NK[0].tolist()):
                y_NC += gates_NK[:, slot] * layer.experts.one(expert, x_NC)
        else:
            experts_A, order_A = chosen_NK.flatten().sort(stable=True)
            tokens_A = order_A // self.config.k
            gates_A1 = gates_NK.flatten()[order_A, None]
            counts = torch.bincount(experts_A, minlength=self.config.n_experts).tolist()
            parts = zip(torch.split(tokens_A, counts), torch.split(gates_A1, counts), strict=True)
            for expert, (tokens, gates) in enumerate(parts):
                if len(tokens):
                    y_NC.index_add_(0, tokens, gates * layer.experts.one(expert, x_NC[tokens]))
        if layer.shared is not None:
            for expert in range(self.config.n_shared_experts):
                y_NC += layer.shared.one(expert, x_NC)
        return y_NC

    def _certain(self, wanted: list[Tensor], n_tokens: int) -> list[bool]:
        """For each token, whether its K experts are the same ones within the error, in every MoE layer."""
        k = self.config.k
        if not wanted or k == self.config.n_experts:
            return [True] * n_tokens
        ranked_MNK = torch.stack(wanted).topk(k + 1).values
        return ((ranked_MNK[..., k - 1] - ranked_MNK[..., k]) > 2 * self._router_error).all(0).tolist()

    @torch.inference_mode()
    def _measure_errors(self) -> tuple[float, float]:
        """Bounds on the error of float32: of a hidden state's norm, and of what experts are chosen by.

        Probes end before the first token whose experts differ between the two precisions: what follows differs by more
        than rounding, and where it happens the choice is reported as not certain.
        """
        generator = torch.Generator().manual_seed(0)
        length = min(self.config.block_size, _PROBE_TOKENS)
        hidden_errors: list[float] = []
        router_errors = [0.0]
        for probe in torch.randint(len(self.wte_VC), (_PROBES, length), generator=generator).tolist():
            low_TC, low_wanted = self._forward([probe], torch.float32, [0])
            high_TC, high_wanted = self._forward([probe], torch.float64, None)
            same = length
            for low_TE, high_TE in zip(low_wanted, high_wanted, strict=True):
                pairs = zip(self._experts_of(low_TE), self._experts_of(high_TE), strict=True)
                same = min(same, next((t for t, (low, high) in enumerate(pairs) if low != high), length))
            hidden_errors += (low_TC - high_TC)[0, :same].norm(dim=-1).tolist()
            for position in range(max(0, length - _STEPPED), same):
                stepped_C = self._step_uncaptured(probe[position], position)
                hidden_errors.append((stepped_C - high_TC[0, position]).norm().item())
            hidden_errors += (high_TC[0, :same].norm(dim=-1) * 2.0**-24).tolist()
            for low_TE, high_TE in zip(low_wanted, high_wanted, strict=True):
                router_errors += (low_TE - high_TE)[:same].abs().amax(-1).tolist()
                router_errors += (high_TE[:same].abs().amax(-1) * 2.0**-24).tolist()
        if not hidden_errors or not all(map(math.isfinite, hidden_errors + router_errors)):
            return math.inf, math.inf  # float32 says nothing about this model: every token is computed in float64
        return SAFETY * max(hidden_errors), SAFETY * max(router_errors)

    def _step_uncaptured(self, token: int, position: int) -> Tensor:
        """(C,): one token appended to the first row. A graph would compute the same, and cost a capture."""
        if self._loops is not None:
            return self._loops.step([token], [position], self._cache, self._router_error)[0][0]
        tokens_1, positions_1 = torch.tensor([[token], [position]], device=self.device)
        return self._advance(tokens_1, positions_1, _round_up(position + 1))[0][0]

    def _experts_of(self, wanted_TE: Tensor) -> list[list[int]]:
        chosen: list[list[int]] = wanted_TE.topk(self.config.k).indices.sort().values.tolist()
        return chosen


def _cast(pair: tuple[Tensor, Tensor | None], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    weight, bias = pair
    if weight.dtype == dtype:
        return pair
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _round_up(n: int) -> int:
    return -(-n // _STRIDE) * _STRIDE
