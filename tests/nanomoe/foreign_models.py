"""Models as other programs save them: transformers' GPT-2 folder, and the `ckpt.pt` of nanoGPT's train.py."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanomoe.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16}
BLOCK_SIZE = 24


def gpt2(vocab_size: int = 256, **options: Any) -> "GPT2LMHeadModel":
    """A small random GPT-2 with the exact GELU, biases and norms drawn too."""
    # Not on top: every process that collects tests would pay for it.
    from transformers import GPT2Config, GPT2LMHeadModel

    given: dict[str, Any] = SHAPE | {"n_positions": BLOCK_SIZE, "vocab_size": vocab_size, "activation_function": "gelu"}
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(**given | {"bos_token_id": None, "eos_token_id": None} | options))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3)
    return model.eval()


def save_gpt2(folder: Path, model: "GPT2LMHeadModel") -> Path:
    """The folder that transformers writes, with the tokenizer of plain bytes."""
    model.save_pretrained(folder)
    load_tokenizer("bytes").save(folder)
    return folder


def nanogpt_state(model: "GPT2LMHeadModel", prefix: str = "") -> dict[str, Tensor]:
    """The weights of a GPT-2 as nanoGPT names and lays them out: Linear, and the tied head twice."""
    conv1d = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    state = model.state_dict()
    return {prefix + name: (w.T.contiguous() if name.endswith(conv1d) else w) for name, w in state.items()}


def nanogpt_checkpoint(model: "GPT2LMHeadModel", prefix: str = "") -> dict[str, Any]:
    """What nanoGPT's train.py gives to torch.save."""
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights)
    sum(weight.sum() for weight in weights).backward()  # type: ignore[union-attr]
    optimizer.step()
    optimizer.zero_grad()
    vocab_size = model.config.vocab_size
    return {
        "model": nanogpt_state(model, prefix),
        "optimizer": optimizer.state_dict(),
        "model_args": SHAPE | {"block_size": BLOCK_SIZE, "bias": True, "vocab_size": vocab_size, "dropout": 0.0},
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "dataset": "openwebtext", "learning_rate": 6e-4, "compile": True},
    }
