"""Random models for the tests of generation."""

import torch

from nanomoe.config import ModelConfig
from nanomoe.model.gpt import GPT

BLOCK_SIZE = 24
EVERY_OPTION = {
    "use_moe": True, "n_experts": 5, "k": 3, "moe_stride": 1, "norm_topk_prob": False, "router_score": "sigmoid",
    "n_shared_experts": 2, "expert_hidden_ratio": 0.5, "router_bias_update_rate": 0.01, "router_noise": True,
    "capacity_factor": 0.1, "bias": False,
}  # fmt: skip
CONFIGS = {
    "dense": {},
    "dense without bias": {"bias": False},
    "wide": {"n_embd": 80, "n_head": 2},
    "moe": {"use_moe": True, "n_experts": 8, "k": 2},
    "moe, every option": EVERY_OPTION,
    "moe, one expert": {"use_moe": True, "n_experts": 1, "k": 1},
}


def random_model(vocab_size: int = 97, *, spread: float = 6.0, seed: int = 0, **knobs: object) -> GPT:
    """A model whose weights are spread so widely that its choices depend on all of the context."""
    config = ModelConfig.model_validate({"block_size": BLOCK_SIZE, "n_layer": 2, "n_head": 2, "n_embd": 16, **knobs})
    model = GPT(config, vocab_size)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(spread)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for layer in model.moe_layers.values():
            if layer.router.balance_bias is not None:
                layer.router.balance_bias.normal_(0, 0.1, generator=generator)
    return model
