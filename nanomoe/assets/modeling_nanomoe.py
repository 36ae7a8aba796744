"""nanoMoE for transformers: a GPT-2-shaped model some of whose MLPs are a mixture of experts.

This file travels with an exported checkpoint and is loaded with `trust_remote_code=True`; it needs torch and
transformers, nothing else. It computes what nanomoe computes in evaluation: no dropout, no router noise, no capacity.
Every expert sees every token and the gates choose, which is plain rather than fast. There is no cache of keys and
values: each new token reads the whole context again.

Shape letters: B sequences, T tokens, C channels, H heads, E experts, K experts per token, F hidden channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class NanoMoEConfig(PretrainedConfig):
    """The shape of the model; the fields have nanomoe's names."""

    model_type = "nanomoe"

    def __init__(
        self,
        vocab_size: int = 8192,
        block_size: int = 100,
        n_layer: int = 4,
        n_head: int = 4,
        n_embd: int = 128,
        bias: bool = True,
        n_experts: int = 8,
        k: int = 2,
        moe_stride: int = 2,
        renormalises_gates: bool = True,
        router_score: str = "softmax",
        router_noise: bool = False,
        balance_bias: bool = False,
        n_shared_experts: int = 0,
        expert_hidden: int = 512,
        **kwargs: object,
    ) -> None:
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.max_position_embeddings = block_size
        self.n_layer = self.num_hidden_layers = n_layer
        self.n_head = self.num_attention_heads = n_head
        self.n_embd = self.hidden_size = n_embd
        self.bias = bias
        self.n_experts = n_experts
        self.k = k
        self.moe_stride = moe_stride
        self.renormalises_gates = renormalises_gates
        self.router_score = router_score
        self.router_noise = router_noise
        self.balance_bias = balance_bias
        self.n_shared_experts = n_shared_experts
        self.expert_hidden = expert_hidden
        kwargs.setdefault("tie_word_embeddings", True)
        super().__init__(**kwargs)


class LayerNorm(nn.Module):
    def __init__(self, config: NanoMoEConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x_BTC: Tensor) -> Tensor:
        return F.layer_norm(x_BTC, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self, config: NanoMoEConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        q, k, v = self.c_attn(x_BTC).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: NanoMoEConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x_BTC)))


class Router(nn.Module):
    def __init__(self, config: NanoMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.n_embd))
        if config.router_noise:  # learned in training, read by nobody afterwards
            self.noise_weight = nn.Parameter(torch.empty(config.n_experts, config.n_embd))
        self.register_buffer("balance_bias", torch.zeros(config.n_experts) if config.balance_bias else None)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Gates (B, T, E): zero for the experts that a token does not go to."""
        wide = torch.promote_types(x_BTC.dtype, torch.float32)
        logits_BTE = x_BTC.to(wide) @ self.weight.to(wide).T
        scores_BTE = logits_BTE.softmax(-1) if self.config.router_score == "softmax" else logits_BTE.sigmoid()
        wanted_BTE = scores_BTE if self.balance_bias is None else scores_BTE + self.balance_bias
        chosen_BTK = wanted_BTE.sort(dim=-1, descending=True, stable=True).indices[..., : self.config.k]
        gates_BTK = scores_BTE.gather(-1, chosen_BTK)
        if self.config.renormalises_gates:
            gates_BTK = gates_BTK / gates_BTK.sum(-1, keepdim=True)
        return torch.zeros_like(scores_BTE).scatter(-1, chosen_BTK, gates_BTK)


class Experts(nn.Module):
    def __init__(self, config: NanoMoEConfig, n_experts: int) -> None:
        super().__init__()
        E, C, hidden = n_experts, config.n_embd, config.expert_hidden
        self.w_in = nn.Parameter(torch.empty(E, C, hidden))
        self.w_out = nn.Parameter(torch.empty(E, hidden, C))
        self.b_in = nn.Parameter(torch.empty(E, hidden)) if config.bias else None
        self.b_out = nn.Parameter(torch.empty(E, C)) if config.bias else None

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, E, C): every expert's output for every token."""
        hidden_BTEF = torch.einsum("btc,ecf->btef", x_BTC, self.w_in)
        if self.b_in is not None:
            hidden_BTEF = hidden_BTEF + self.b_in
        out_BTEC = torch.einsum("btef,efc->btec", F.gelu(hidden_BTEF), self.w_out)
        return out_BTEC if self.b_out is None else out_BTEC + self.b_out


class MoE(nn.Module):
    def __init__(self, config: NanoMoEConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config, config.n_experts)
        self.shared = Experts(config, config.n_shared_experts) if config.n_shared_experts else None

    def forward(self, x_BTC: Tensor) -> Tensor:
        gates_BTE = self.router(x_BTC).to(x_BTC.dtype)
        y_BTC = (self.experts(x_BTC) * gates_BTE[..., None]).sum(2)
        return y_BTC if self.shared is None else y_BTC + self.shared(x_BTC).sum(2)


class Block(nn.Module):
    def __init__(self, config: NanoMoEConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config)
        self.mlp = MoE(config) if (layer + 1) % config.moe_stride == 0 else MLP(config)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attn(self.ln_1(x_BTC))
        return x_BTC + self.mlp(self.ln_2(x_BTC))


class NanoMoEForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model; its output layer is the token embedding."""

    config_class = NanoMoEConfig
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: NanoMoEConfig) -> None:
        super().__init__(config)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": LayerNorm(config),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer["wte"]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: this class opens trained weights."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: object) -> dict[str, Tensor]:
        """The newest `block_size` tokens: positions are absolute, so an older context slides out of sight."""
        return {"input_ids": input_ids[:, -self.config.block_size :]}

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: object) -> CausalLMOutput:
        """Logits (B, T, V) of each next token, and with `labels` (shifted here, -100 ignored) their mean loss."""
        T = input_ids.shape[1]
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens do not fit the model's {self.config.block_size} positions")
        x_BTC = self.transformer["wte"](input_ids) + self.transformer["wpe"](torch.arange(T, device=input_ids.device))
        for block in self.transformer["h"]:
            x_BTC = block(x_BTC)
        logits_BTV = self.lm_head(self.transformer["ln_f"](x_BTC))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits_BTV)
