"""The weights that a model starts from when it has a parent: a dense one grows into a mixture (sparse upcycling).

Komatsuzaki et al., arXiv 2212.05055: every expert starts as a copy of the MLP it replaces, the router at random.
Knows names and shapes of weights, no model and no file; `nanomoe.lineage` says which parents fit.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nanomoe.config import ModelConfig

ROUTER_STD = 0.02


def starting_weights(parent: Mapping[str, Tensor], config: ModelConfig, *, seed: int) -> dict[str, Tensor]:
    """The parent's weights as a model of `config` names them; tensors that need no change are shared with `parent`.

    An MLP where this model has a mixture becomes its experts. A mixture stays, and gets a noise weight or balance bias
    of 0 where only this model has one. A shorter context keeps the first positions (nanoGPT's `crop_block_size`).
    `seed` decides the routers and `upcycle_noise`.
    """
    weights = dict(parent)
    positions = weights["transformer.wpe.weight"]
    if len(positions) > config.block_size:
        weights["transformer.wpe.weight"] = positions[: config.block_size].contiguous()
    generator = torch.Generator().manual_seed(seed)
    for layer in config.moe_layers:
        prefix = f"transformer.h.{layer}.mlp."
        if prefix + "c_fc.weight" in weights:
            mlp = {name: weights.pop(name) for name in list(weights) if name.startswith(prefix)}
            _grow(mlp, weights, prefix, config, generator)
        router_EC = weights[prefix + "router.weight"]
        for name, wanted, zeros in (
            ("router.noise_weight", config.router_noise, torch.zeros_like(router_EC)),
            ("router.balance_bias", config.router_bias_update_rate > 0, torch.zeros_like(router_EC[:, 0])),
        ):
            if not wanted:
                weights.pop(prefix + name, None)
            else:
                weights.setdefault(prefix + name, zeros)
    return weights


def _grow(
    mlp: Mapping[str, Tensor],
    weights: dict[str, Tensor],
    prefix: str,
    config: ModelConfig,
    generator: torch.Generator,
) -> None:
    """Put a router and experts into `weights` in place of an MLP."""
    E, C, hidden = config.n_experts, config.n_embd, config.expert_hidden
    fc_HC, proj_CH = mlp[prefix + "c_fc.weight"], mlp[prefix + "c_proj.weight"]

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=fc_HC.dtype).normal_(generator=generator).to(fc_HC.device)

    # Expert e takes the next F of the MLP's H hidden channels, round and round: with F = H all of them, with fewer each
    # expert another part. Scaling by H / F keeps the answer when channels repeat, and its size when some are missing.
    channel_EF = (torch.arange(E * hidden, device=fc_HC.device) % len(fc_HC)).view(E, hidden)
    w_in = fc_HC[channel_EF].mT.contiguous()  # (E, C, F)
    w_out = proj_CH.T[channel_EF] * (len(fc_HC) / hidden)  # (E, F, C)
    if config.upcycle_noise > 0:
        w_in = w_in + config.upcycle_noise * fc_HC.std() * normal(*w_in.shape)
        w_out = w_out + config.upcycle_noise * w_out.std() * normal(*w_out.shape)

    weights[prefix + "router.weight"] = ROUTER_STD * normal(E, C)
    weights[prefix + "experts.w_in"] = w_in
    weights[prefix + "experts.w_out"] = w_out
    if config.bias:
        weights[prefix + "experts.b_in"] = mlp[prefix + "c_fc.bias"][channel_EF]
        weights[prefix + "experts.b_out"] = mlp[prefix + "c_proj.bias"].repeat(E, 1)
    if config.n_shared_experts:
        # A shared expert adds nothing at first, and learns from the first step: only its second matrix starts at 0.
        shared_SF = torch.arange(config.n_shared_experts * hidden, device=fc_HC.device).view(-1, hidden) % len(fc_HC)
        weights[prefix + "shared.w_in"] = fc_HC[shared_SF].mT.contiguous()
        weights[prefix + "shared.w_out"] = w_out.new_zeros(config.n_shared_experts, hidden, C)
        if config.bias:
            weights[prefix + "shared.b_in"] = mlp[prefix + "c_fc.bias"][shared_SF]
            weights[prefix + "shared.b_out"] = w_out.new_zeros(config.n_shared_experts, C)
