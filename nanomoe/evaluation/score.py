"""How likely each token of a text is: its loss, or its log-probability beside the likeliest tokens in its place.

Knows no HTTP and no file.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nanomoe.data import IGNORE, Windows
from nanomoe.generation.logprobs import LogProbs, TokenLogProb
from nanomoe.model.gpt import GPT, token_losses

_LOGITS_AT_ONCE = 1 << 24
"""64 MB of float32: windows are read together as long as their logits fit."""


@torch.no_grad()
def losses_of_tokens(model: GPT, tokens: list[int]) -> list[float]:
    """Cross-entropy of every token but the first, in nats, dropout off; a long text in windows as in training."""
    losses: list[float] = []
    for logits_BTV, targets_BT in _read(model, tokens):
        losses += token_losses(logits_BTV, targets_BT)[targets_BT != IGNORE].tolist()
    return losses


@torch.no_grad()
def logprobs_of_tokens(model: GPT, tokens: list[int], n_likeliest: int) -> list[LogProbs]:
    """Log-probability of every token but the first, and of the `n_likeliest` tokens in its place: minus what
    `losses_of_tokens` gives, in windows as there, and not finite where that is not."""
    found: list[LogProbs] = []
    if len(tokens) < 2:
        return found
    for logits_BTV, targets_BT in _read(model, tokens):
        counted_BT = targets_BT != IGNORE
        logprobs_NV = logits_BTV[counted_BT].float().log_softmax(-1)
        targets_N = targets_BT[counted_BT]
        chosen_N = logprobs_NV.gather(1, targets_N[:, None])[:, 0].tolist()
        likeliest_NK, ids_NK = logprobs_NV.topk(min(n_likeliest, logprobs_NV.shape[1]))
        found += [
            LogProbs(TokenLogProb(token, chosen), tuple(map(TokenLogProb, ids, likeliest)))
            for token, chosen, ids, likeliest in zip(
                targets_N.tolist(), chosen_N, ids_NK.tolist(), likeliest_NK.tolist(), strict=True
            )
        ]
    return found


def _read(model: GPT, tokens: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (B, T, V) and targets (B, T) of the windows of two tokens or more, dropout off."""
    model.eval()
    device = next(model.parameters()).device
    windows = Windows(torch.tensor(tokens, device=device), model.config.block_size)
    size = model.config.block_size * model.transformer.wte.num_embeddings
    for batch in windows.batches(max(1, min(16, _LOGITS_AT_ONCE // size))):
        inputs_BT, targets_BT = windows.batch(batch)
        yield model(inputs_BT).logits_BTV, targets_BT
