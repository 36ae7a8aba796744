"""The mixture of experts, slowly: one token, one expert, one loop, straight from the formulas.

Reads the weights of an MoE by name and shares no code with it. Gradients are torch's own, through these loops.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nanomoe.config import ModelConfig


@dataclass
class Reference:
    """What one pass gives."""

    outputs: Tensor
    """(T, C)"""
    logits: Tensor
    """(T, E), clean."""
    probs: Tensor
    """(T, E)"""
    chosen: list[list[int]]
    gates: list[list[Tensor]]
    counts: list[int]
    dropped: int
    aux_loss: Tensor
    z_loss: Tensor


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def mlp(weights: dict[str, Tensor], prefix: str, expert: int, x: Tensor) -> Tensor:
    hidden = x @ weights[prefix + "w_in"][expert]
    if prefix + "b_in" in weights:
        hidden = hidden + weights[prefix + "b_in"][expert]
    output = gelu(hidden) @ weights[prefix + "w_out"][expert]
    if prefix + "b_out" in weights:
        output = output + weights[prefix + "b_out"][expert]
    return output


def reference_moe(
    config: ModelConfig,
    weights: dict[str, Tensor],
    x_TC: Tensor,
    *,
    training: bool,
    keep_TNC: Tensor | None = None,
    noise_TE: Tensor | None = None,
    without_expert: int | None = None,
) -> Reference:
    """`weights` are the MoE's parameters and buffers by name; the rest as in `MoE.forward`, its tokens flattened."""
    T, E, K = len(x_TC), config.n_experts, config.k
    capacity = T * K
    if training and config.capacity_factor is not None:
        capacity = max(1, math.ceil(config.capacity_factor * T * K / E))
    normalise = K > 1 if config.norm_topk_prob is None else config.norm_topk_prob
    bias = weights.get("router.balance_bias")

    outputs, all_logits, all_probs, all_chosen, all_gates, squares = [], [], [], [], [], []
    counts = [0] * E
    dropped = 0
    for t in range(T):
        x = x_TC[t]
        logits = torch.stack([(weights["router.weight"][e] * x).sum() for e in range(E)])
        squares.append(torch.log(torch.exp(logits).sum()) ** 2)
        noisy = logits
        if noise_TE is not None:
            spread = torch.stack([(weights["router.noise_weight"][e] * x).sum() for e in range(E)])
            noisy = logits + noise_TE[t] * torch.log(1 + torch.exp(spread))
        if config.router_score == "softmax":
            scores = torch.exp(noisy) / torch.exp(noisy).sum()
        else:
            scores = 1 / (1 + torch.exp(-noisy))
        wanted = [(scores[e] + (0 if bias is None else bias[e])).item() for e in range(E)]
        chosen = sorted(range(E), key=lambda e: (-wanted[e], e))[:K]
        gates = [scores[e] for e in chosen]
        if normalise:
            gates = [gate / sum(gates) for gate in gates]

        output = torch.zeros_like(x)
        for j, e in enumerate(chosen):
            counts[e] += 1
            if counts[e] > capacity:
                dropped += 1
                continue
            if e == without_expert:
                continue
            answer = mlp(weights, "experts.", e, x)
            output = output + gates[j] * (answer if keep_TNC is None else answer * keep_TNC[t, j])
        for s in range(config.n_shared_experts):
            answer = mlp(weights, "shared.", s, x)
            output = output + (answer if keep_TNC is None else answer * keep_TNC[t, K + s])

        outputs.append(output)
        all_logits.append(logits)
        all_probs.append(scores / scores.sum())
        all_chosen.append(chosen)
        all_gates.append(gates)

    aux_loss = E * sum(counts[e] / (T * K) * sum(all_probs[t][e] for t in range(T)) / T for e in range(E))
    return Reference(
        outputs=torch.stack(outputs),
        logits=torch.stack(all_logits),
        probs=torch.stack(all_probs),
        chosen=all_chosen,
        gates=all_gates,
        counts=counts,
        dropped=dropped,
        aux_loss=torch.as_tensor(aux_loss),
        z_loss=sum(squares) / T,
    )
