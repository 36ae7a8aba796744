"""What `nanomoe.bench.training.peers` needs of a nanoGPT checkout, for tests: the same names of classes, settings and
parameters, over the project's own modules, which have nanoGPT's semantics."""

from pathlib import Path

MODEL = """
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from nanomoe.config import ModelConfig
from nanomoe.model.gpt import Transformer


@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        names = ("block_size", "n_layer", "n_head", "n_embd", "bias")
        ours = ModelConfig(**{name: getattr(config, name) for name in names})
        self.transformer = Transformer(ours, config.vocab_size)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        print("number of parameters")

    def forward(self, idx, targets=None):
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(idx.shape[1]))
        for block in self.transformer.h:
            x, _ = block(x, None)
        logits = self.lm_head(self.transformer.ln_f(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
"""


def write(folder: Path) -> Path:
    """A folder that looks like a checkout."""
    folder.mkdir()
    (folder / "model.py").write_text(MODEL, encoding="utf-8")
    return folder
