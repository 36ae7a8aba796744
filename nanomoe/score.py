"""The loss of each token of any text. Knows no HTTP and no file."""

import torch

from nanomoe.data import IGNORE, Windows
from nanomoe.model import GPT, token_losses

_LOGITS_AT_ONCE = 1 << 24
"""64 MB of float32: windows are read together as long as their logits fit."""


@torch.no_grad()
def losses_of_tokens(model: GPT, tokens: list[int]) -> list[float]:
    """Cross-entropy of every token but the first, in nats, dropout off; a long text in windows as in training."""
    model.eval()
    device = next(model.parameters()).device
    windows = Windows(torch.tensor(tokens, device=device), model.config.block_size)
    losses: list[float] = []
    size = model.config.block_size * model.transformer.wte.num_embeddings
    for batch in windows.batches(max(1, min(16, _LOGITS_AT_ONCE // size))):
        inputs_BT, targets_BT = windows.batch(batch)
        losses += token_losses(model(inputs_BT).logits_BTV, targets_BT)[targets_BT != IGNORE].tolist()
    return losses
