"""The mixture of experts: Router, Experts, MoE, and the Routing that every pass returns.

Shape letters, also name suffixes: T tokens of the batch, flattened; C channels (`n_embd`); E experts (`n_experts`);
K experts per token (`k`); A = T * K assignments; F hidden channels of one expert; S slots, the rows of the experts'
products; N any number.

A pass is a pure function of its arguments and the weights: noise and dropout masks are drawn by the caller, losses and
counts are returned, nothing is collected, and nothing on the way waits for a device. Knows no block, no training loop
and no metrics.
"""

import math
from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomoe.config import ModelConfig

ExpertPath = Literal["padded", "grouped", "masked"]

# Measured on two cores: a batched product over padded groups beats the grouped one, by 1.2 to 2.8 times, until more
# than half of its rows are padding; where an expert has fewer than four rows or so, the grouped one in float32 wins.
_MOST_PADDING = 2.0
_FEW_ROWS = 4


@dataclass(frozen=True)
class Routing:
    """Where one MoE layer sent its tokens. Only the two losses and the gates carry a gradient worth following."""

    logits_TE: Tensor
    """The router's clean logits, float32 or the model's wider type."""

    probs_TE: Tensor
    """Scores as probabilities: each row sums to 1. In training with `router_noise` those of the noisy logits."""

    chosen_TK: Tensor
    """int64: each token's experts, the highest score first, ties to the lowest index."""

    gates_TK: Tensor
    """The weights of the chosen experts' outputs, before any assignment is dropped."""

    counts_E: Tensor
    """int64: assignments to each expert before dropping; they sum to T * K."""

    dropped: Tensor
    """int64, one number: assignments beyond the capacity. 0 outside training."""

    aux_loss: Tensor
    """Load balance, one number: E * sum_e f_e * P_e (Switch, arXiv 2101.03961, eq. 4-6), unweighted; 1 is balanced."""

    z_loss: Tensor
    """Mean squared logsumexp of the clean logits, one number (ST-MoE, arXiv 2202.08906, eq. 5), unweighted."""


class Router(nn.Module):
    """Scores every expert for every token, in float32 or the model's wider type whatever autocast says."""

    noise_weight: Tensor | None
    balance_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = (config.n_experts, config.n_embd)
        self.k = config.k
        self.score = config.router_score
        self.renormalises = config.renormalises_gates
        self.weight = nn.Parameter(torch.empty(shape))
        self.register_parameter("noise_weight", nn.Parameter(torch.empty(shape)) if config.router_noise else None)
        has_bias = config.router_bias_update_rate > 0
        self.register_buffer("balance_bias", torch.zeros(config.n_experts) if has_bias else None)

    def forward(self, x_TC: Tensor, noise_TE: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Clean logits (T, E), probabilities (T, E), chosen experts (T, K) and their gates (T, K)."""
        with torch.autocast(x_TC.device.type, enabled=False):
            wide = torch.promote_types(torch.promote_types(x_TC.dtype, self.weight.dtype), torch.float32)
            x_TC = x_TC.to(wide)
            logits_TE = x_TC @ self.weight.to(wide).T
            noisy_TE = logits_TE
            if noise_TE is not None:
                assert self.noise_weight is not None, "noise needs router_noise"
                # Shazeer et al., arXiv 1701.06538, eq. 4: the router learns how much noise each token deserves.
                noisy_TE = logits_TE + noise_TE.to(wide) * F.softplus(x_TC @ self.noise_weight.to(wide).T)
            if self.score == "softmax":
                scores_TE = probs_TE = noisy_TE.softmax(-1)
            else:
                scores_TE = noisy_TE.sigmoid()
                probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
            # The balance bias (DeepSeek-V3, arXiv 2412.19437) steers the choice; the gates never see it. A stable sort,
            # not topk: only it promises that ties go to the lowest index.
            wanted_TE = scores_TE.detach() if self.balance_bias is None else scores_TE.detach() + self.balance_bias
            chosen_TK = wanted_TE.sort(dim=-1, descending=True, stable=True).indices[:, : self.k]
            gates_TK = scores_TE.gather(-1, chosen_TK)
            if self.renormalises:
                gates_TK = gates_TK / gates_TK.sum(-1, keepdim=True)
            return logits_TE, probs_TE, chosen_TK, gates_TK


@dataclass(frozen=True)
class Assignments:
    """The T * K assignments sorted by expert: in flattened token order within an expert, and none dropped."""

    chosen_TK: Tensor
    """Each token's experts, in gate order."""

    order_A: Tensor
    """The flat assignment t * K + j at each sorted position."""

    position_A: Tensor
    """The sorted position of each flat assignment: the inverse of `order_A`."""

    ends_E: Tensor
    """The sorted position after each expert's last assignment."""

    counts_E: Tensor
    """The assignments to each expert."""

    @classmethod
    def of(cls, chosen_TK: Tensor, n_experts: int) -> Self:
        """Sort the choices. Shapes depend on T, K and E only, so no device is waited for."""
        sorted_A, order_A = chosen_TK.flatten().sort(dim=0, stable=True)
        position_A = torch.empty_like(order_A).scatter(0, order_A, torch.arange(len(order_A), device=order_A.device))
        # Made from the choices, so that it lies contiguous where this is mapped over several models.
        experts_E = chosen_TK.new_zeros(n_experts) + torch.arange(n_experts, device=sorted_A.device)
        ends_E = torch.searchsorted(sorted_A, experts_E, right=True)
        return cls(chosen_TK, order_A, position_A, ends_E, ends_E - torch.searchsorted(sorted_A, experts_E))

    def tokens(self) -> Tensor:
        """(A,): the token at each sorted position."""
        return self.order_A.div(self.chosen_TK.shape[1], rounding_mode="floor")

    def one_hot(self) -> Tensor:
        """(A, E) bool: which expert the assignment at each sorted position went to."""
        expert_A1 = self.chosen_TK.flatten().index_select(0, self.order_A)[:, None]
        return expert_A1 == torch.arange(len(self.counts_E), device=expert_A1.device)

    def ranks(self) -> Tensor:
        """(T, K): how many assignments to the same expert come before each one, in flattened token order."""
        starts_A = (self.ends_E - self.counts_E).index_select(0, self.chosen_TK.flatten())
        return (self.position_A - starts_A).view_as(self.chosen_TK)


class Experts(nn.Module):
    """Stacked MLPs, Linear C -> F, exact GELU, Linear F -> C, and three ways to run the chosen ones.

    Each way lays rows out for its product and says in which row, the slot, an assignment's output is to be found:
    `masked` runs every expert on every token; `padded` gives each expert as many rows as the busiest has assignments;
    `grouped` gives each just its own, and needs a grouped product.
    """

    b_in: Tensor | None
    b_out: Tensor | None

    def __init__(self, n_experts: int, n_embd: int, hidden: int, *, bias: bool) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(n_experts, n_embd, hidden))
        self.register_parameter("b_in", nn.Parameter(torch.empty(n_experts, hidden)) if bias else None)
        self.w_out = nn.Parameter(torch.empty(n_experts, hidden, n_embd))
        self.register_parameter("b_out", nn.Parameter(torch.empty(n_experts, n_embd)) if bias else None)

    def init_weights(self, n_layer: int, generator: torch.Generator | None) -> None:
        """Weights N(0, 0.02^2), those into the residual stream divided by sqrt(2 n_layer); biases 0."""
        _normal(self.w_in, 0.02, generator)
        _normal(self.w_out, 0.02 / math.sqrt(2 * n_layer), generator)
        for bias in (self.b_in, self.b_out):
            if bias is not None:
                nn.init.zeros_(bias)

    def all_outputs(self, x_TC: Tensor) -> Tensor:
        """(E, T, C): every expert's output for every token."""
        return self._batched(x_TC.expand(len(self.w_in), *x_TC.shape))

    def forward(self, x_TC: Tensor, assignments: Assignments, path: ExpertPath) -> Tensor:
        """(T, K, C): the output of each token's chosen experts, in gate order.

        Raises ValueError when `path` cannot run on this device, type or width; `choose_expert_path` never picks such.
        """
        if path == "padded":
            if x_TC.device.type != "cpu":
                raise ValueError("the padded path reads how long the groups are, which only a CPU does without waiting")
            longest = int(assignments.counts_E.max())
            too_long = longest * len(self.w_in) > _MOST_PADDING * len(assignments.order_A)
            if not too_long or self._not_grouped_because(x_TC):
                return self._in_padded_groups(x_TC, assignments, longest)
        elif path == "masked":
            return self.everywhere(x_TC, assignments.chosen_TK)
        elif reason := self._not_grouped_because(x_TC):
            raise ValueError(f"the grouped path cannot run: {reason}")
        return self._in_grouped_product(x_TC, assignments)

    def everywhere(self, x_TC: Tensor, chosen_TK: Tensor) -> Tensor:
        """`forward` on the masked path, for which no assignment has to be sorted."""
        slot_TK = chosen_TK * len(x_TC) + torch.arange(len(x_TC), device=x_TC.device)[:, None]
        return _rows(self.all_outputs(x_TC).flatten(0, 1), slot_TK)

    def _in_padded_groups(self, x_TC: Tensor, assignments: Assignments, longest: int) -> Tensor:
        slot_TK = assignments.chosen_TK * longest + assignments.ranks()
        # Padding repeats token 0: nobody reads its output, so its gradient is zero.
        token_S = slot_TK.new_zeros(len(self.w_in) * longest)
        token_S[slot_TK] = torch.arange(len(x_TC))[:, None]
        rows_EMC = x_TC.index_select(0, token_S).view(-1, longest, x_TC.shape[1])
        return _rows(self._batched(rows_EMC).flatten(0, 1), slot_TK)

    def _in_grouped_product(self, x_TC: Tensor, assignments: Assignments) -> Tensor:
        dtype = _product_dtype(x_TC)
        x_AC = x_TC.index_select(0, assignments.tokens()).to(dtype)
        ends_E = assignments.ends_E.to(torch.int32)
        hidden_AF = F.grouped_mm(x_AC, self.w_in.to(dtype), offs=ends_E)
        if self.b_in is None or self.b_out is None:
            out_AC = F.grouped_mm(F.gelu(hidden_AF), self.w_out.to(dtype), offs=ends_E)
        else:
            # Biases as products: their gradients are too, where those of a gather would be added up row by row.
            one_hot_AE = assignments.one_hot().to(dtype)
            hidden_AF = F.gelu(torch.addmm(hidden_AF, one_hot_AE, self.b_in.to(dtype)))
            out_AC = F.grouped_mm(hidden_AF, self.w_out.to(dtype), offs=ends_E)
            out_AC = torch.addmm(out_AC, one_hot_AE, self.b_out.to(dtype))
        return _rows(out_AC, assignments.position_A.view_as(assignments.chosen_TK))

    def _batched(self, x_ENC: Tensor) -> Tensor:
        """Expert e on its rows (N, C), all in one product."""
        dtype = _product_dtype(x_ENC)
        x_ENC, w_in, w_out = x_ENC.to(dtype), self.w_in.to(dtype), self.w_out.to(dtype)
        if self.b_in is None or self.b_out is None:
            return F.gelu(x_ENC @ w_in) @ w_out
        hidden_ENF = F.gelu(torch.baddbmm(self.b_in.to(dtype)[:, None], x_ENC, w_in))
        return torch.baddbmm(self.b_out.to(dtype)[:, None], hidden_ENF, w_out)

    def _not_grouped_because(self, x_TC: Tensor) -> str | None:
        _, n_embd, hidden = self.w_in.shape
        return not_grouped_because(n_embd, hidden, x_TC.device, _product_dtype(x_TC))


def _normal(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    with torch.no_grad():
        weight.copy_(torch.empty(weight.shape, dtype=weight.dtype).normal_(0, std, generator=generator))


def _rows(out_SC: Tensor, slot_TK: Tensor) -> Tensor:
    # index_select, not out_SC[slot_TK]: three to seven times as fast on a CPU.
    return out_SC.index_select(0, slot_TK.flatten()).view(*slot_TK.shape, -1)


def _product_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class MoE(nn.Module):
    """A mixture of experts in place of an MLP: y = sum over a token's chosen experts of gate * expert(x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.path: ExpertPath | None = None
        """The experts' computing path in training; None, and every evaluation, leave it to `choose_expert_path`."""
        width = (config.n_embd, config.expert_hidden)
        self.router = Router(config)
        self.experts = Experts(config.n_experts, *width, bias=config.bias)
        self.shared = Experts(config.n_shared_experts, *width, bias=config.bias) if config.n_shared_experts else None

    def init_weights(self, n_layer: int, generator: torch.Generator | None = None) -> None:
        """Fresh weights of a layer in a model of `n_layer` blocks, drawn from `generator`.

        The numbers are drawn on the CPU, so that one seed means one model on every device.
        """
        _normal(self.router.weight, 0.02, generator)
        for zero in (self.router.noise_weight, self.router.balance_bias):
            if zero is not None:
                nn.init.zeros_(zero)
        self.experts.init_weights(n_layer, generator)
        if self.shared is not None:
            self.shared.init_weights(n_layer, generator)

    def forward(
        self,
        x_BTC: Tensor,
        *,
        keep: Tensor | None = None,
        noise_TE: Tensor | None = None,
        without_expert: int | None = None,
        n_tokens: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """(B, T, C) -> (B, T, C), and where its tokens, flattened, were sent.

        `keep` (B, T, K + n_shared_experts, C) is a ready dropout mask, 0 or 1 / (1 - p), for the output of each token's
        j-th choice, then of the shared experts; None drops nothing. `noise_TE` is standard normal noise for
        `router_noise`; None adds none. `without_expert` leaves one routed expert's output out of the sum. `n_tokens`
        (0-dim, int64, on the device): the tokens after the first so many are padding, of which the output means
        nothing, and which neither losses nor counts nor the capacity know.
        """
        x_TC = x_BTC.flatten(0, -2)
        logits_TE, probs_TE, chosen_TK, gates_TK = self.router(x_TC, noise_TE)
        assignments = Assignments.of(chosen_TK, self.config.n_experts)
        y_TC, dropped = self.mix(
            x_TC, chosen_TK, gates_TK, assignments=assignments, keep=keep, without_expert=without_expert,
            n_tokens=n_tokens,
        )  # fmt: skip
        squares_T = logits_TE.logsumexp(-1).square()
        if n_tokens is None:
            counts_E, n = assignments.counts_E, chosen_TK.numel()
            share_E, mean_E, z_loss = counts_E.to(probs_TE.dtype) / n, probs_TE.mean(0), squares_T.mean()
        else:
            is_token_T = torch.arange(len(x_TC), device=x_TC.device) < n_tokens
            chosen_TKE = chosen_TK[..., None] == torch.arange(self.config.n_experts, device=x_TC.device)
            counts_E = (chosen_TKE & is_token_T[:, None, None]).sum((0, 1))
            some = n_tokens.clamp(min=1)
            share_E = counts_E.to(probs_TE.dtype) / (some * self.config.k)
            mean_E = (probs_TE * is_token_T[:, None]).sum(0) / some
            z_loss = (squares_T * is_token_T).sum() / some
        return y_TC.to(x_BTC.dtype).view_as(x_BTC), Routing(
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            chosen_TK=chosen_TK,
            gates_TK=gates_TK,
            counts_E=counts_E,
            dropped=dropped,
            aux_loss=self.config.n_experts * (share_E @ mean_E),
            z_loss=z_loss,
        )

    def mix(
        self,
        x_TC: Tensor,
        chosen_TK: Tensor,
        gates_TK: Tensor,
        *,
        assignments: Assignments | None = None,
        keep: Tensor | None = None,
        without_expert: int | None = None,
        n_tokens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(T, C): what the chosen experts make of their tokens, weighted by the gates and added up with the shared
        experts; and how many assignments exceeded the capacity, int64.

        `assignments` are those of `chosen_TK`; None sorts them here, if anything needs them. The others as of
        `forward`.
        """
        k, path = self.config.k, self.path if self.training else None
        if path is None:
            path, _ = choose_expert_path(self.config, len(x_TC), x_TC.device, _product_dtype(x_TC))
        factor = self.config.capacity_factor if self.training else None
        if assignments is None and (factor is not None or path != "masked"):
            assignments = Assignments.of(chosen_TK, self.config.n_experts)

        weights_TK = gates_TK
        dropped = chosen_TK.new_zeros(())
        if assignments is not None and factor is not None:
            if n_tokens is None:
                dropped_TK = assignments.ranks() >= expert_capacity(factor, len(x_TC), k, self.config.n_experts)
            else:  # what comes first has the lower ranks, so padding takes no place
                capacity = (factor * n_tokens.double() * k / self.config.n_experts).ceil().clamp(min=1)
                is_token_T1 = torch.arange(len(x_TC), device=x_TC.device)[:, None] < n_tokens
                dropped_TK = (assignments.ranks() >= capacity) & is_token_T1
            weights_TK = weights_TK.masked_fill(dropped_TK, 0.0)
            dropped = dropped_TK.sum()
        if without_expert is not None:
            weights_TK = weights_TK.masked_fill(chosen_TK == without_expert, 0.0)

        if assignments is None:
            out_TKC = self.experts.everywhere(x_TC, chosen_TK)
        else:
            out_TKC = self.experts(x_TC, assignments, path)
        keep_TNC = None if keep is None else keep.flatten(0, -3)
        if keep_TNC is not None:
            out_TKC = out_TKC * keep_TNC[:, :k]
        y_TC = (out_TKC * weights_TK[..., None]).sum(1)
        if self.shared is not None:
            shared_TNC = self.shared.all_outputs(x_TC).transpose(0, 1)
            if keep_TNC is not None:
                shared_TNC = shared_TNC * keep_TNC[:, k:]
            y_TC = y_TC + shared_TNC.sum(1)
        return y_TC, dropped

    @torch.no_grad()
    def update_balance_bias(self, counts_E: Tensor) -> None:
        """After an optimizer step: b += router_bias_update_rate * sign(mean(n) - n_e) (DeepSeek-V3, arXiv 2412.19437).

        `counts_E` are the assignments before dropping of the whole step: all its micro-batches. Without a balance bias
        (a rate of 0) nothing is done.
        """
        if self.router.balance_bias is not None:
            shift_balance_bias(self.router.balance_bias, counts_E, self.config.router_bias_update_rate)


def shift_balance_bias(bias: Tensor, counts: Tensor, rate: float) -> None:
    """`MoE.update_balance_bias` of one bias (E,), or of several at once (..., E), with counts of the same shape."""
    # E * mean(n) is the sum of n: integers, so that a perfectly balanced step moves nothing.
    shortage = counts.sum(-1, keepdim=True) - counts.shape[-1] * counts
    bias.add_(shortage.sign(), alpha=rate)


def expert_capacity(capacity_factor: float, n_tokens: int, k: int, n_experts: int) -> int:
    """Assignments of a micro-batch's T * K that each expert takes: max(1, ceil(capacity_factor * T * K / E))."""
    return max(1, math.ceil(capacity_factor * n_tokens * k / n_experts))


def not_grouped_because(n_embd: int, hidden: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why torch's grouped product cannot, or should not, multiply these matrices here; None when it can."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"grouped products take no {str(dtype).removeprefix('torch.')}"
    per_16_bytes = 16 // dtype.itemsize
    if n_embd % per_16_bytes or hidden % per_16_bytes:
        return f"the widths {n_embd} and {hidden} are not multiples of 16 bytes ({per_16_bytes} numbers)"
    if device.type == "cuda":
        has_kernel = torch.cuda.get_device_capability(device)[0] in (9, 10)  # Hopper, Blackwell
        if dtype != torch.bfloat16 or not has_kernel:
            return "on this GPU and type torch multiplies group by group, and waits for the GPU to learn their lengths"
    return None


def choose_expert_path(
    config: ModelConfig, n_tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[ExpertPath, str]:
    """The computing path for a pass of `n_tokens` tokens with products in `dtype`, and the reason in words."""
    if config.k == config.n_experts:
        return "masked", "every token goes to every expert"
    not_grouped = not_grouped_because(config.n_embd, config.expert_hidden, device, dtype)
    if device.type != "cpu":
        return ("masked", not_grouped) if not_grouped else ("grouped", "grouped products on the device")
    if not not_grouped and dtype == torch.float32 and n_tokens * config.k < _FEW_ROWS * config.n_experts:
        return "grouped", "few tokens per expert"
    if not_grouped:
        return "padded", f"batched products over padded groups; {not_grouped}"
    return "padded", "batched products over padded groups; grouped ones whenever padding would double the rows"
