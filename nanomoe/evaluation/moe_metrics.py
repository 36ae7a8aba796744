"""Measure the routers of a checkpoint: how the experts share the load, how decided and how stable the choices are.

Pure functions from where tokens were sent to metrics, which `nanomoe.evaluation.metrics` declares. Knows no model and
no file.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor

from nanomoe.config import ModelConfig
from nanomoe.evaluation.metrics import CardToken, MixtureFigures, MixtureLayer, MixtureMetrics
from nanomoe.model.moe import Assignments, Routing, expert_capacity
from nanomoe.tokenizer import Tokenizer

DEAD_SHARE = 0.1
"""An expert with less than this part of an equal share of the load is dead."""

DROPPED_TOO_MUCH = 0.1
"""Share of dropped assignments above which a warning is raised."""

UNDECIDED, DECIDED_FOR_ALL = 0.99, 0.01
"""Router entropies above and below which, after half of training, a warning is raised."""

DEAD_GRADIENT = 1e-8
"""Norm of the router's gradient below which it does not learn: what rounding leaves of an exact zero."""


@dataclass(frozen=True)
class LayerRouting:
    """Where one layer sent the tokens of a text that have a target; sums over them, so that parts of it can be joined.

    Shape letters as in `nanomoe.model.moe`.
    """

    chosen_TK: Tensor
    """int64: each token's experts, in gate order."""

    probs_E: Tensor
    """float64: each expert's probability, summed over tokens."""

    entropy: Tensor
    """float64, one number: the entropy of each token's probabilities, in nats, summed."""

    squared_logsumexp: Tensor
    """float64, one number: logsumexp(logits)^2, summed."""

    @classmethod
    def of(cls, routing: Routing, counted_T: Tensor) -> Self:
        """The tokens of a pass for which `counted_T` (bool) is true."""
        return cls.of_tokens(*(each[counted_T] for each in (routing.chosen_TK, routing.probs_TE, routing.logits_TE)))

    @classmethod
    def of_tokens(cls, chosen_TK: Tensor, probs_TE: Tensor, logits_TE: Tensor) -> Self:
        """All of these tokens; arguments as in `Routing`."""
        wide_TE = probs_TE.double()
        return cls(
            chosen_TK=chosen_TK,
            probs_E=wide_TE.sum(0),
            entropy=torch.special.entr(wide_TE).sum(),
            squared_logsumexp=logits_TE.double().logsumexp(-1).square().sum(),
        )

    @classmethod
    def join(cls, parts: list[Self]) -> Self:
        """The parts of a text, one after the other."""
        return cls(
            chosen_TK=torch.cat([part.chosen_TK for part in parts]),
            probs_E=torch.stack([part.probs_E for part in parts]).sum(0),
            entropy=torch.stack([part.entropy for part in parts]).sum(),
            squared_logsumexp=torch.stack([part.squared_logsumexp for part in parts]).sum(),
        )

    def load(self) -> Tensor:
        """(E,) float64: each expert's share of the T * K assignments."""
        return Assignments.of(self.chosen_TK, len(self.probs_E)).counts_E.double() / self.chosen_TK.numel()

    def importance(self) -> Tensor:
        """(E,) float64: each expert's mean probability."""
        return self.probs_E / len(self.chosen_TK)


def moe_metrics(
    routing: Mapping[int, LayerRouting],
    config: ModelConfig,
    *,
    tokens_per_batch: int,
    previous_choices: Mapping[int, Tensor],
    train_dropped: Mapping[int, float],
    router_grad_norms: Mapping[int, float],
    losses_without: Mapping[int, list[float]] | None,
    cards: Mapping[int, list[list[CardToken]]],
) -> MixtureMetrics:
    """The metrics of a mixture: those of each MoE layer, and their mean and maximum over the layers.

    All mappings go by the layer's index. `tokens_per_batch`: tokens of a training micro-batch, for which a capacity is
    counted. `previous_choices` (T, K) are those of the checkpoint before, on the same text: where they are missing
    `churn` is null, as is `train_dropped_fraction` without `train_dropped`. `losses_without` None (too many experts)
    makes `loss_without` null. `cards` are `expert_cards`.
    """
    layers = [
        MixtureLayer(
            **_figures(routed, config, tokens_per_batch, previous_choices.get(layer)),
            train_dropped_fraction=train_dropped.get(layer),
            router_grad_norm=router_grad_norms[layer],
            layer=layer,
            load=routed.load().tolist(),
            importance=routed.importance().tolist(),
            loss_without=None if losses_without is None else losses_without[layer],
            cards=cards[layer],
        )
        for layer, routed in routing.items()
    ]
    columns = {name: [getattr(layer, name) for layer in layers] for name in MixtureFigures.model_fields}
    known = {name: [value for value in column if value is not None] for name, column in columns.items()}
    return MixtureMetrics(
        layers=layers,
        mean=MixtureFigures(
            **{name: math.fsum(column) / len(column) if column else None for name, column in known.items()}
        ),
        max=MixtureFigures(**{name: max(column, default=None) for name, column in known.items()}),
    )


def _figures(
    routed: LayerRouting, config: ModelConfig, tokens_per_batch: int, previous_TK: Tensor | None
) -> dict[str, Any]:
    """The single numbers of one layer, but those that training counted."""
    n_tokens, k = routed.chosen_TK.shape
    n_experts = config.n_experts
    load_E, importance_E = routed.load(), routed.importance()

    dropped = unrouted = 0
    if config.capacity_factor is not None:
        for chosen_TK in routed.chosen_TK.split(tokens_per_batch):
            capacity = expert_capacity(config.capacity_factor, len(chosen_TK), k, n_experts)
            dropped_TK = Assignments.of(chosen_TK, n_experts).ranks() >= capacity
            dropped += int(dropped_TK.sum())
            unrouted += int(dropped_TK.all(-1).sum())

    largest_entropy = math.log(n_experts)
    return {
        "load_cv": load_E.std(correction=0).item() * n_experts,
        "max_violation": load_E.max().item() * n_experts - 1,
        "load_entropy": torch.special.entr(load_E).sum().item() / largest_entropy if n_experts > 1 else 1.0,
        "router_entropy": routed.entropy.item() / n_tokens / largest_entropy if n_experts > 1 else 0.0,
        "dead_experts": int((load_E < DEAD_SHARE / n_experts).sum()),
        "dropped_fraction": dropped / (n_tokens * k),
        "unrouted_fraction": unrouted / n_tokens,
        "churn": None if previous_TK is None else churn(routed.chosen_TK, previous_TK),
        "aux_loss": n_experts * (load_E @ importance_E).item(),
        "z_loss": routed.squared_logsumexp.item() / n_tokens,
    }


def churn(chosen_TK: Tensor, previous_TK: Tensor) -> float:
    """1 - the mean share of each token's experts that it had at the checkpoint before: 0 is stable, 1 all new.

    Row t of both is the routing of the text's token t, as an input.
    """
    kept_TK = (chosen_TK[:, :, None] == previous_TK.to(chosen_TK)[:, None, :]).any(-1)
    return 1 - kept_TK.double().mean().item()


def expert_cards(
    chosen_TK: Tensor, tokens: list[int], n_experts: int, tokenizer: Tokenizer, *, n_tokens: int = 10
) -> list[list[CardToken]]:
    """The `n_tokens` tokens that were routed to each expert most often, the most frequent first.

    `tokens` are the T inputs that were routed. Ties go to the lower token id.
    """
    n_ids = max(tokens) + 1
    pairs_TK = chosen_TK * n_ids + torch.tensor(tokens, device=chosen_TK.device)[:, None]
    pairs, times = torch.unique(pairs_TK, return_counts=True)  # ascending: expert by expert, token by token
    starts = torch.searchsorted(pairs, torch.arange(n_experts + 1, device=pairs.device) * n_ids).tolist()
    cards = []
    for first, end in pairwise(starts):
        most = times[first:end].sort(stable=True, descending=True).indices[:n_tokens] + first
        ids, counts = (pairs[most] % n_ids).tolist(), times[most].tolist()
        cards.append([CardToken(token=tokenizer.decode([i]), id=i, times=n) for i, n in zip(ids, counts, strict=True)])
    return cards


def moe_warnings(moe: MixtureMetrics, *, after_half: bool) -> list[tuple[str, str]]:
    """(code, message) of what looks wrong with a mixture; `after_half`: more than half of the training is done."""
    found: list[tuple[str, str]] = []

    def warn(code: str, name: str, is_wrong: Callable[[float], bool], meaning: str) -> None:
        values = {layer.layer: getattr(layer, name) for layer in moe.layers}
        bad = {layer: value for layer, value in values.items() if value is not None and is_wrong(value)}
        if bad:
            figures = ", ".join(f"{value:.3g} in layer {layer}" for layer, value in bad.items())
            found.append((code, f"{meaning}: {name} is {figures}"))

    warn("dead_expert", "dead_experts", lambda n: n > 0, "some experts get less than a tenth of an equal share")
    in_training = moe.max.train_dropped_fraction is not None
    dropped = "train_dropped_fraction" if in_training else "dropped_fraction"
    warn("tokens_dropped", dropped, lambda share: share > DROPPED_TOO_MUCH, "many assignments exceed the capacity")
    if len(moe.layers[0].load or ()) == 1:
        return found  # a single expert is always chosen: its router has nothing to decide and no gradient
    if after_half:
        warn("router_undecided", "router_entropy", lambda h: h > UNDECIDED, "the router rates all experts alike")
        warn(
            "router_collapsed", "router_entropy", lambda h: h < DECIDED_FOR_ALL, "the router leaves no expert a chance"
        )
    warn("dead_router", "router_grad_norm", lambda norm: norm < DEAD_GRADIENT, "the router does not learn")
    return found
