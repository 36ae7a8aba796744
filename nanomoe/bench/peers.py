"""How others continue a prompt: the work that the engine is measured beside.

The same weights, the same prompts, the same number of new tokens, sampled with the same temperature and top_k. Peers
get the models as they are, in evaluation mode, and all threads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nanomoe.config import SamplingConfig
from nanomoe.export import gpt2_model
from nanomoe.model.gpt import GPT

Continue = Callable[[Tensor, int, SamplingConfig], Tensor]
"""From prompts (N, T), the number of new tokens and how to sample them to all tokens (N, T + new)."""


def nanogpt(model: GPT) -> Continue:
    """nanoGPT's `generate`: the whole window through the model for every token, logits of the last position only.

    Its modules are ours in evaluation, operator for operator; a mixture of experts goes through `nanomoe.model.moe`,
    which is faster than a loop over experts.
    """

    @torch.inference_mode()
    def extend(tokens_NT: Tensor, max_new_tokens: int, sampling: SamplingConfig) -> Tensor:
        for _ in range(max_new_tokens):
            logits_NV = _last_logits(model, tokens_NT[:, -model.config.block_size :]) / sampling.temperature
            least_N1 = logits_NV.topk(min(sampling.top_k or model.vocab_size, model.vocab_size)).values[:, -1:]
            logits_NV[logits_NV < least_N1] = -float("inf")
            next_N1 = torch.multinomial(F.softmax(logits_NV, dim=-1), num_samples=1)
            tokens_NT = torch.cat([tokens_NT, next_N1], dim=1)
        return tokens_NT

    return extend


def _last_logits(model: GPT, tokens_NT: Tensor) -> Tensor:
    transformer = model.transformer
    x_NTC = transformer.wte(tokens_NT) + transformer.wpe(torch.arange(tokens_NT.shape[1], device=tokens_NT.device))
    for block in model.blocks:
        x_NTC, _ = block(x_NTC, None)
    return F.linear(transformer.ln_f(x_NTC)[:, -1], transformer.wte.weight)


def transformers_cached(model: GPT) -> Continue:
    """transformers' `generate` with its cache of keys and values: over `GPT2LMHeadModel` with the same weights, or,
    since no class of transformers computes our mixture, over a Mixtral of the same depth, width, experts and k.

    Mixtral's experts have a third matrix, so theirs are made narrower by a third; all its layers are mixtures, so it
    has more parameters than ours, but a token meets equally many.
    """
    theirs: Any = _mixtral(model) if model.config.use_moe else gpt2_model(model.state_dict(), model.config)
    theirs.eval().to(model.transformer.wte.weight.device)

    @torch.inference_mode()
    def extend(tokens_NT: Tensor, max_new_tokens: int, sampling: SamplingConfig) -> Tensor:
        generated: Tensor = theirs.generate(
            tokens_NT,
            attention_mask=torch.ones_like(tokens_NT),
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            pad_token_id=0,
            use_cache=True,
        )
        return generated

    return extend


def _mixtral(model: GPT) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = model.config
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=model.vocab_size,
            hidden_size=config.n_embd,
            intermediate_size=8 * round(2 * config.expert_hidden / 3 / 8),  # its kernels want multiples of 8
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_head,
            max_position_embeddings=config.block_size,
            num_local_experts=config.n_experts,
            num_experts_per_tok=config.k,
            tie_word_embeddings=True,
        )
    )
