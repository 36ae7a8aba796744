"""AdamW's parameter groups and the learning-rate schedule."""

import math

import torch
from torch import nn

from nanomoe.config import TrainConfig


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay goes by role: matrices decay; LayerNorm weights and biases, stacked (E, F) or not, never do."""
    leaf = name.rsplit(".", 1)[-1]
    return parameter.dim() >= 2 and leaf not in ("bias", "b_in", "b_out")


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with one group that decays and one that does not."""
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """The rate of step `step`, from 0: linear warm-up, then constant or half a cosine from `lr` to `min_lr`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * min(1.0, progress))) * (config.lr - config.min_lr)
