"""How the experts share the load: the balance metrics of a checkpoint, and what looks wrong in them.

Every figure is measured in evaluation mode on the tokens of the training text that have a target. Shape letters:
T tokens, E experts, K experts per token.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from nanomoe.config import ModelConfig
from nanomoe.moe import Routing, expert_capacity

DEAD_GRADIENT = 1e-7
"""Norm below which a router's gradient is rounding: a live one is thousands of times larger."""

CARD_TOKENS = 10
"""Tokens that an expert's card names."""


@dataclass(frozen=True)
class LayerRouting:
    """The routing of a whole text in one layer; losses are means over tokens, so parts can be joined."""

    probs_TE: Tensor
    chosen_TK: Tensor
    z_T: Tensor
    """Squared logsumexp of each token's logits."""

    @classmethod
    def of(cls, routing: Routing, real_T: Tensor) -> Self:
        """Of one batch, only the tokens that `real_T` marks."""
        z_T = routing.logits_TE.logsumexp(-1).square()
        return cls(routing.probs_TE[real_T], routing.chosen_TK[real_T], z_T[real_T])

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """The batches of a text, one after another."""
        return cls(
            torch.cat([part.probs_TE for part in parts]),
            torch.cat([part.chosen_TK for part in parts]),
            torch.cat([part.z_T for part in parts]),
        )


def moe_metrics(
    routing: Mapping[int, LayerRouting],
    config: ModelConfig,
    *,
    tokens_per_batch: int,
    previous_choices: Mapping[int, Tensor],
    train_dropped: Mapping[int, float],
    router_grad_norms: Mapping[int, float],
    losses_without: Mapping[int, Sequence[float]] | None,
) -> dict[str, Any]:
    """The `moe` object of a checkpoint: `layers`, and `mean` and `max` over them of every figure that is one number.

    `tokens_per_batch`: tokens of a training micro-batch, from which a capacity follows. The other mappings are by
    layer: the choices of the checkpoint before (T, K), the share of assignments that training dropped since then, the
    norm of the gradient at the router, and the loss without each expert.
    """
    layers = []
    for layer, of_layer in routing.items():
        figures = layer_metrics(of_layer, config, tokens_per_batch, previous_choices.get(layer))
        figures["train_dropped_fraction"] = train_dropped.get(layer, 0.0)
        figures["router_grad_norm"] = router_grad_norms[layer]
        figures["loss_without"] = None if losses_without is None else list(losses_without[layer])
        layers.append({"layer": layer} | figures)
    numbers = [name for name, value in layers[0].items() if isinstance(value, int | float) and name != "layer"]
    columns = {name: [figures[name] for figures in layers] for name in numbers}
    return {
        "layers": layers,
        "mean": {name: sum(column) / len(column) for name, column in columns.items()},
        "max": {name: max(column) for name, column in columns.items()},
    }


def layer_metrics(
    routing: LayerRouting, config: ModelConfig, tokens_per_batch: int, previous_TK: Tensor | None
) -> dict[str, Any]:
    """The figures of one layer that follow from its routing alone; JSON-ready."""
    E, K = config.n_experts, config.k
    chosen_TK, probs_TE = routing.chosen_TK, routing.probs_TE.double()
    T = len(chosen_TK)
    counts_E = torch.bincount(chosen_TK.flatten(), minlength=E).double()
    load_E = counts_E / (T * K)
    importance_E = probs_TE.mean(0)
    dropped, unrouted = (0, 0)
    if config.capacity_factor is not None:
        dropped, unrouted = _would_drop(chosen_TK, config, tokens_per_batch)
    return {
        "load": load_E.tolist(),
        "importance": importance_E.tolist(),
        "load_cv": (counts_E.std(correction=0) / counts_E.mean()).item(),
        "max_violation": (counts_E.max() / (T * K / E)).item() - 1,
        "load_entropy": _entropy(load_E) / math.log(E) if E > 1 else 1.0,
        "router_entropy": torch.special.entr(probs_TE).sum(-1).mean().item() / math.log(E) if E > 1 else 0.0,
        "dead_experts": int((load_E < 0.1 / E).sum()),
        "dropped_fraction": dropped / (T * K),
        "unrouted_fraction": unrouted / T,
        "churn": None if previous_TK is None else churn(previous_TK.to(chosen_TK.device), chosen_TK),
        "aux_loss": (E * (load_E * importance_E).sum()).item(),
        "z_loss": routing.z_T.double().mean().item(),
    }


def _entropy(shares_E: Tensor) -> float:
    return torch.special.entr(shares_E).sum().item()


def churn(before_TK: Tensor, now_TK: Tensor) -> float:
    """1 - the mean share of a token's K experts that it had before: 0 is stable, 1 is all new."""
    shared_T = (now_TK[:, :, None] == before_TK[:, None, :]).any(-1).double().mean(-1)
    return 1 - shared_T.mean().item()


def _would_drop(chosen_TK: Tensor, config: ModelConfig, tokens_per_batch: int) -> tuple[int, int]:
    """Assignments, and tokens with all of theirs, that `capacity_factor` would drop of the text cut into batches."""
    dropped = unrouted = 0
    for batch_TK in chosen_TK.split(tokens_per_batch):
        assert config.capacity_factor is not None
        capacity = expert_capacity(config.capacity_factor, len(batch_TK), config.k, config.n_experts)
        is_mine_AE = torch.nn.functional.one_hot(batch_TK.flatten(), config.n_experts)
        rank_A = (is_mine_AE.cumsum(0) - 1).gather(1, batch_TK.flatten()[:, None])
        over_TK = rank_A.view_as(batch_TK) >= capacity
        dropped += int(over_TK.sum())
        unrouted += int(over_TK.all(-1).sum())
    return dropped, unrouted


def expert_cards(chosen_TK: Tensor, tokens: Sequence[int], n_experts: int) -> list[list[tuple[int, int]]]:
    """Of each expert the tokens that were most often routed to it, as (token id, times), at most ten; most often first.

    `tokens`: the id of each of the T tokens.
    """
    cards: list[Counter[int]] = [Counter() for _ in range(n_experts)]
    for token, experts in zip(tokens, chosen_TK.tolist(), strict=True):
        for expert in experts:
            cards[expert][token] += 1
    return [card.most_common(CARD_TOKENS) for card in cards]


def moe_warnings(moe: Mapping[str, Any], *, after_half: bool) -> list[tuple[str, str]]:
    """(code, message) of what looks wrong in a checkpoint's `moe` object.

    `after_half`: more than half of the training is done, so that an undecided or a frozen router is no beginner's.
    """
    found = []
    for figures in moe["layers"]:
        where = f"layer {figures['layer']}"
        if dead := figures["dead_experts"]:
            found.append(("dead_expert", f"{where}: {dead} experts get less than a tenth of an even share"))
        for name, what in (("train_dropped_fraction", "were dropped in training"), ("dropped_fraction", "would be")):
            if figures[name] > 0.1:
                found.append(("tokens_dropped", f"{where}: {figures[name]:.0%} of the assignments {what} by capacity"))
                break
        entropy = figures["router_entropy"]
        if after_half and len(figures["load"]) > 1 and not 0.01 <= entropy <= 0.99:
            how = "undecided" if entropy > 0.5 else "frozen"
            found.append(
                (f"router_{how}", f"{where}: the router is {how}, its entropy is {entropy:.3f} of the largest")
            )
        if len(figures["load"]) > 1 and figures["router_grad_norm"] < DEAD_GRADIENT:
            found.append(("router_dead", f"{where}: the language-model loss gives the router no gradient"))
    return found
