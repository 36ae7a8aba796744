"""The GPT: nanoGPT's parameter names and semantics, some of its MLPs a mixture of experts.

Shape letters: B windows, T tokens of a window, C = n_embd channels, H heads, D = C / H, V vocabulary.

Dropout is handed in (`nanomoe.model.dropout`), so a forward pass without it is the evaluation, whatever the module's
mode. Knows no loss, no optimizer and no file.
"""

import math
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanomoe.config import ModelConfig
from nanomoe.model.dropout import EMBEDDING, Dropout, LayerDropout, Site
from nanomoe.model.moe import MoE, Routing

INIT_STD = 0.02
"""Standard deviation of initial weights (GPT-2)."""


class Linear(nn.Linear):
    """torch's affine layer, its weights left unset: `GPT.init_weights` or `load_state_dict` sets them."""

    def reset_parameters(self) -> None:
        """Do nothing: torch's own draws numbers that nobody would use."""


class Embedding(nn.Embedding):
    """torch's table of vectors, its weights left unset: `GPT.init_weights` or `load_state_dict` sets them."""

    def reset_parameters(self) -> None:
        """Do nothing, for the reason that `Linear.reset_parameters` gives."""


class LayerNorm(nn.Module):
    """Layer normalisation over the channels, eps 1e-5, with optional bias."""

    def __init__(self, n_embd: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x_BTC: Tensor) -> Tensor:
        return F.layer_norm(x_BTC, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what came before it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x_BTC: Tensor, dropout: LayerDropout | None) -> Tensor:
        B, T, C = x_BTC.shape
        q, k, v = self.c_attn(x_BTC).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        if dropout is None:
            y_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            # The fused kernels draw their own masks, so dropout on the weights needs them written out.
            scores_BHTT = (q @ k.transpose(-2, -1)) * (1 / math.sqrt(q.shape[-1]))
            future_TT = torch.ones(T, T, dtype=torch.bool, device=x_BTC.device).triu_(1)
            weights_BHTT = scores_BHTT.masked_fill(future_TT, float("-inf")).softmax(-1)
            y_BHTD = dropout.weights(weights_BHTT).to(v.dtype) @ v
        y_BTC: Tensor = self.c_proj(y_BHTD.transpose(1, 2).reshape(B, T, C))
        return y_BTC if dropout is None else dropout.output(Site.ATTENTION_OUTPUT, y_BTC)


class MLP(nn.Module):
    """Linear C -> 4C, exact GELU, Linear 4C -> C."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x_BTC: Tensor, dropout: LayerDropout | None) -> Tensor:
        y_BTC: Tensor = self.c_proj(F.gelu(self.c_fc(x_BTC)))
        return y_BTC if dropout is None else dropout.output(Site.MLP_OUTPUT, y_BTC)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) or x + moe(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp: MLP | MoE = MoE(config) if config.is_moe_layer(layer) else MLP(config)

    def forward(
        self, x_BTC: Tensor, dropout: Dropout | None, without_expert: int | None = None, n_tokens: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        _, T, C = x_BTC.shape
        own = LayerDropout(dropout, self.layer) if dropout is not None and self.config.dropout > 0 else None
        x_BTC = x_BTC + self.attn(self.ln_1(x_BTC), own)
        if isinstance(self.mlp, MLP):
            return x_BTC + self.mlp(self.ln_2(x_BTC), own), None
        noise_TE = None
        if dropout is not None and self.config.router_noise:
            noise_TE = dropout.noise(self.layer, T, self.config.n_experts).flatten(0, 1)
        keep = None if own is None else own.of_experts(T, self.config.k + self.config.n_shared_experts, C)
        y_BTC, routing = self.mlp(
            self.ln_2(x_BTC), keep=keep, noise_TE=noise_TE, without_expert=without_expert, n_tokens=n_tokens
        )
        return x_BTC + y_BTC, routing


class Transformer(nn.Module):
    """The embeddings, the blocks and the last norm; a module of its own because nanoGPT's names say so."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.wte = Embedding(vocab_size, config.n_embd)
        self.wpe = Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.bias)


class ModelOutput(NamedTuple):
    """What a forward pass gives."""

    logits_BTV: Tensor
    routings: dict[int, Routing]
    """{layer: routing} of each MoE layer."""


class GPT(nn.Module):
    """A language model: for every token, the logits of the next. The output layer is the token embedding (tied)."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.recomputes = False
        """Whether a backward pass computes each block again instead of keeping its activations (Chen et al., arXiv
        1604.06174): the gradient is the same, bit for bit."""
        self.transformer = Transformer(config, vocab_size)

    @classmethod
    def build(cls, config: ModelConfig, vocab_size: int, device: torch.device | str = "cpu") -> Self:
        """A model on `device` whose weights are not set yet: for `init_weights` or `load_state_dict`."""
        with torch.device(device):
            return cls(config, vocab_size)

    def init_weights(self, seed: int) -> None:
        """nanoGPT's initialisation: N(0, 0.02), residual projections N(0, 0.02 / sqrt(2 n_layer)), biases 0.

        The numbers are drawn on the CPU, so that one seed means one model on every device.
        """
        generator = torch.Generator().manual_seed(seed)
        residual_std = INIT_STD / math.sqrt(2 * self.config.n_layer)

        def normal(weight: Tensor, std: float) -> None:
            weight.copy_(torch.empty(weight.shape, dtype=weight.dtype).normal_(0, std, generator=generator))

        with torch.no_grad():
            for name, module in self.named_modules():
                if isinstance(module, MoE):
                    module.init_weights(self.config.n_layer, generator)
                elif isinstance(module, LayerNorm):
                    module.weight.fill_(1)
                    if module.bias is not None:
                        module.bias.zero_()
                elif isinstance(module, nn.Embedding):
                    normal(module.weight, INIT_STD)
                elif isinstance(module, nn.Linear):
                    normal(module.weight, residual_std if name.endswith("c_proj") else INIT_STD)
                    if module.bias is not None:
                        module.bias.zero_()

    @property
    def moe_layers(self) -> dict[int, MoE]:
        """The MoE of each layer that has one, by its index."""
        return {block.layer: block.mlp for block in self.blocks if isinstance(block.mlp, MoE)}

    @property
    def blocks(self) -> list[Block]:
        """The blocks, first to last."""
        return cast(list[Block], list(self.transformer.h))

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding."""
        return self.transformer.wte.num_embeddings

    def forward(
        self, tokens_BT: Tensor, *, dropout: Dropout | None = None, without: tuple[int, int] | None = None
    ) -> ModelOutput:
        """Logits of each next token. T is at most `block_size`.

        `dropout` None is the evaluation. `without` = (layer, expert) removes that expert's output.
        """
        hidden_BTC, routings = self.hidden(tokens_BT, dropout=dropout, without=without)
        return ModelOutput(self.logits(hidden_BTC), routings)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of the next token after hidden states (..., C)."""
        return F.linear(hidden, self.transformer.wte.weight)

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        dropout: Dropout | None = None,
        without: tuple[int, int] | None = None,
        n_tokens: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, Routing]]:
        """Hidden states (B, T, C) that `logits` reads, and the routing of each MoE layer; arguments as of `forward`.

        `n_tokens` (0-dim, int64, on the device): the tokens after the first so many, window by window, are padding,
        which no mixture counts.
        """
        _, T = tokens_BT.shape
        assert self.config.block_size >= T, f"{T} tokens do not fit block_size {self.config.block_size}"
        wte, wpe = self.transformer.wte, self.transformer.wpe
        x_BTC = wte(tokens_BT) + wpe(torch.arange(T, device=tokens_BT.device))
        if dropout is not None and self.config.dropout > 0:
            x_BTC = LayerDropout(dropout, EMBEDDING).output(Site.ATTENTION_OUTPUT, x_BTC)
        routings = {}
        for block in self.blocks:
            removed = without[1] if without is not None and without[0] == block.layer else None
            if self.recomputes and torch.is_grad_enabled():
                # No random state to restore: dropout is a pure function.
                arguments = block, x_BTC, dropout, removed, n_tokens
                x_BTC, routing = checkpoint(*arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTC, routing = block(x_BTC, dropout, removed, n_tokens)
            if routing is not None:
                routings[block.layer] = routing
        hidden_BTC: Tensor = self.transformer.ln_f(x_BTC)
        return hidden_BTC, routings


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy (B, T) in nats, 0 where the target is ignored; in float32, or float64 for float64 logits."""
    wide = logits_BTV if logits_BTV.dtype == torch.float64 else logits_BTV.float()
    losses = F.cross_entropy(wide.flatten(0, 1), targets_BT.flatten(), ignore_index=-1, reduction="none")
    return losses.view_as(targets_BT)
