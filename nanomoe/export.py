"""A checkpoint as other programs want it: a folder that transformers opens.

A dense checkpoint is exactly a `GPT2LMHeadModel` whose Linear weights are transposed (GPT-2's are Conv1D, input first),
whose missing biases are zero, and whose activation is the exact GELU. No architecture inside transformers is a
GPT-2-shaped mixture of experts, so that export carries its own modelling file, `assets/modeling_nanomoe.py`.
"""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanomoe.checkpoint import OpenCheckpoint, to_json
from nanomoe.config import ModelConfig
from nanomoe.errors import NanomoeError

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

_MODELLING_FILE = "modeling_nanomoe.py"
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


class NotExportable(NanomoeError, ValueError):
    """The checkpoint has no equal in the format that was asked for."""

    code = "not_exportable"


def gpt2_weights(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The state of a `GPT2LMHeadModel` that computes what a dense GPT with these weights computes."""
    state = {name: weight.T.contiguous() if name.endswith(_TRANSPOSED) else weight for name, weight in weights.items()}
    if not config.bias:
        C = config.n_embd
        widths = {"ln_1": C, "ln_2": C, "attn.c_attn": 3 * C, "attn.c_proj": C, "mlp.c_fc": 4 * C, "mlp.c_proj": C}
        dtype = state["transformer.wte.weight"].dtype
        state["transformer.ln_f.bias"] = torch.zeros(C, dtype=dtype)
        for layer in range(config.n_layer):
            for name, width in widths.items():
                state[f"transformer.h.{layer}.{name}.bias"] = torch.zeros(width, dtype=dtype)
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


def gpt2_model(weights: Mapping[str, Tensor], config: ModelConfig) -> "GPT2LMHeadModel":
    """A `GPT2LMHeadModel`, in evaluation mode and of the weights' type, that computes what our GPT computes.

    Raises:
        NotExportable: the config has a mixture of experts, which no architecture inside transformers has in this form.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    if config.use_moe:
        raise NotExportable("GPT2LMHeadModel has no mixture of experts")
    wte = weights["transformer.wte.weight"]
    theirs: dict[str, Any] = {
        "vocab_size": wte.shape[0],
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "activation_function": "gelu",
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        # The bundled tokenizer has no special tokens; GPT-2's defaults would lie outside its vocabulary.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    model: GPT2LMHeadModel = GPT2LMHeadModel(GPT2Config(**theirs))
    torch.nn.Module.to(model, dtype=wte.dtype)  # the class decorates its own with a signature that mypy cannot read
    model.eval()
    model.load_state_dict(gpt2_weights(weights, config))
    return model


def moe_config(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """The `config.json` of an exported mixture: the shape, and where transformers finds the code."""
    names = ["block_size", "n_layer", "n_head", "n_embd", "bias", "n_experts", "k", "moe_stride", "router_score"]
    names += ["router_noise", "n_shared_experts", "expert_hidden", "renormalises_gates"]
    module = _MODELLING_FILE.removesuffix(".py")
    return {
        "model_type": "nanomoe",
        "architectures": ["NanoMoEForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.NanoMoEConfig",
            "AutoModelForCausalLM": f"{module}.NanoMoEForCausalLM",
        },
        "vocab_size": vocab_size,
        "balance_bias": config.router_bias_update_rate > 0,
        "tie_word_embeddings": True,
    } | {name: getattr(config, name) for name in names}


def export_hf(opened: OpenCheckpoint, to: Path) -> None:
    """Write a checkpoint as the folder `to`, which `AutoModelForCausalLM` and `AutoTokenizer` open.

    A mixture of experts is opened with `trust_remote_code=True`, in any process: nanomoe need not be installed.
    """
    weights, config = opened.weights(), opened.config()
    to.mkdir(parents=True, exist_ok=True)
    if config.use_moe:
        vocab_size = weights["transformer.wte.weight"].shape[0]
        (to / "config.json").write_bytes(to_json(moe_config(config, vocab_size)))
        (to / _MODELLING_FILE).write_bytes((files("nanomoe.assets") / _MODELLING_FILE).read_bytes())
        save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    else:
        gpt2_model(weights, config).save_pretrained(to)
    for name, content in opened.tokenizer().files().items():
        (to / name).write_bytes(content)
