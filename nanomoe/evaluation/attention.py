"""What a model attends to, where it routes, and what it thinks comes next, for one prompt.

The blocks are walked by hand, because the fused attention keeps its weights to itself. Knows no HTTP and no file.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nanomoe.model.gpt import GPT, CausalSelfAttention
from nanomoe.model.moe import Routing


@dataclass(frozen=True)
class Inspection:
    """A prompt of T tokens, read in evaluation mode."""

    probabilities_V: Tensor
    """Probabilities of the next token."""
    attention_LHTT: Tensor
    """Row t: how much token t takes from each token up to itself; rows sum to 1."""
    routing: dict[int, Routing]
    """{layer: where its T tokens were sent} of each mixture of experts; row t is how token t itself was routed."""


@torch.no_grad()
def inspect(model: GPT, tokens: list[int]) -> Inspection:
    """Read the newest `block_size` of `tokens`.

    Raises:
        ValueError: there is no token.
    """
    if not tokens:
        raise ValueError("the prompt has no token")
    model.eval()
    parts = model.transformer
    context = torch.tensor([tokens[-model.config.block_size :]], device=parts.wte.weight.device)
    x_BTC = parts.wte(context) + parts.wpe(torch.arange(context.shape[1], device=context.device))
    attention: list[Tensor] = []
    routing: dict[int, Routing] = {}
    for block in model.blocks:
        attention.append(_attention_weights(block.attn, block.ln_1(x_BTC)))
        x_BTC, routed = block(x_BTC, None)
        if routed is not None:
            routing[block.layer] = routed
    logits_V = parts.ln_f(x_BTC)[0, -1] @ parts.wte.weight.T
    return Inspection(logits_V.softmax(-1), torch.stack(attention), routing)


def _attention_weights(attention: CausalSelfAttention, x_BTC: Tensor) -> Tensor:
    """The attention weights of the only sequence: softmax(q k^T / sqrt(D)) over what is not in the future."""
    _, T, C = x_BTC.shape
    q, k, _ = attention.c_attn(x_BTC).view(T, 3, attention.n_head, C // attention.n_head).permute(1, 2, 0, 3)
    scores_HTT = q @ k.mT / math.sqrt(q.shape[-1])
    future_TT = torch.ones(T, T, dtype=torch.bool, device=x_BTC.device).triu_(1)
    weights_HTT: Tensor = scores_HTT.masked_fill(future_TT, float("-inf")).softmax(-1)
    return weights_HTT
