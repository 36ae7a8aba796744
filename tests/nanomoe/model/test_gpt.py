import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nanomoe.config import JobConfig
from nanomoe.export import gpt2_model, gpt2_weights
from nanomoe.model.dropout import EMBEDDING, Dropout, Site
from nanomoe.model.gpt import GPT, token_losses
from nanomoe.model.size import n_active_params, n_params
from nanomoe.training.optim import AdamW

SMALL = {"block_size": 24, "n_layer": 3, "n_head": 2, "n_embd": 16, "dropout": 0.0}
VOCAB = 61


def built(config: JobConfig, seed: int = 7) -> GPT:
    model = GPT.build(config, VOCAB)
    model.init_weights(seed)
    return model


def test_parameters_have_nanogpts_names_and_shapes() -> None:
    shapes = {name: tuple(p.shape) for name, p in built(JobConfig.model_validate(SMALL)).named_parameters()}
    assert shapes["transformer.wte.weight"] == (61, 16)
    assert shapes["transformer.wpe.weight"] == (24, 16)
    assert shapes["transformer.h.2.attn.c_attn.weight"] == (48, 16)
    assert shapes["transformer.h.0.mlp.c_fc.bias"] == (64,)
    assert shapes["transformer.h.0.ln_1.bias"] == (16,)
    assert "lm_head.weight" not in shapes
    assert len(shapes) == 2 + 3 * 12 + 2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "moe",
    [{}, {"use_moe": True}, {"use_moe": True, "n_shared_experts": 2, "router_noise": True, "moe_stride": 1}],
)
def test_the_arithmetic_of_sizes_counts_what_the_model_holds(bias: bool, moe: dict[str, object]) -> None:
    config = JobConfig.model_validate(SMALL | moe | {"bias": bias})
    held = sum(p.numel() for p in built(config).parameters())
    assert n_params(config, VOCAB) == held
    idle = config.n_experts - config.k if config.use_moe else 0
    width = config.expert_hidden
    expert = 2 * config.n_embd * width + (width + config.n_embd if bias else 0)
    assert n_active_params(config, VOCAB) == held - len(config.moe_layers) * idle * expert


def test_initial_weights_have_gpt2s_spread_and_residual_projections_a_smaller_one() -> None:
    model = built(JobConfig(n_embd=256, n_layer=8, use_moe=True))
    stds = {name: p.std().item() for name, p in model.named_parameters() if p.dim() >= 2}
    residual = 0.02 / math.sqrt(2 * 8)
    for name, std in stds.items():
        if name.rsplit(".", 1)[-1] in ("b_in", "b_out"):
            assert std == 0
            continue
        expected = residual if name.endswith(("c_proj.weight", "w_out")) else 0.02
        assert std == pytest.approx(expected, rel=0.06), name


def test_a_token_sees_nothing_of_what_comes_after_it() -> None:
    model = built(JobConfig.model_validate(SMALL | {"use_moe": True, "k": 2}))
    tokens = torch.randint(VOCAB, (1, 24))
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % VOCAB
    before, after = model(tokens).logits_BTV, model(changed).logits_BTV
    assert torch.allclose(before[:, :-1], after[:, :-1], atol=1e-6)
    assert not torch.allclose(before[:, -1], after[:, -1])


@pytest.mark.parametrize("bias", [True, False])
def test_logits_loss_gradients_and_50_steps_equal_transformers_gpt2(bias: bool) -> None:
    """In float64, from the same weights, with nanoGPT's decay groups on both sides."""
    config = JobConfig.model_validate(SMALL | {"bias": bias, "lr": 3e-3, "weight_decay": 0.1})
    ours = built(config).double()
    theirs = gpt2_model(ours.state_dict(), config)
    torch.manual_seed(0)
    tokens = torch.randint(VOCAB, (4, 24))
    targets = torch.cat([tokens[:, 1:], torch.full((4, 1), -1)], 1)

    their_parameters = {
        # Without bias, what our model does not have must not move in theirs.
        name: p
        for name, p in theirs.named_parameters()
        if bias or not name.endswith("bias")
    }
    their_optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in their_parameters.values() if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in their_parameters.values() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        foreach=False,
    )
    our_optimizer = AdamW(ours, config)
    for step in range(51):
        our_logits, their_logits = ours(tokens).logits_BTV, theirs(tokens).logits
        torch.testing.assert_close(our_logits, their_logits, rtol=1e-9, atol=1e-9)
        our_loss = token_losses(our_logits, targets).sum() / (targets != -1).sum()
        their_loss = F.cross_entropy(their_logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        torch.testing.assert_close(our_loss, their_loss, rtol=1e-9, atol=1e-9)
        our_optimizer.zero_grad()
        their_optimizer.zero_grad()
        our_loss.backward()
        their_loss.backward()
        if step == 0:
            gradients = gpt2_weights({name: p.grad for name, p in ours.named_parameters()}, config)
            for name, parameter in their_parameters.items():
                torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-9)
        our_optimizer.step()
        their_optimizer.step()
    for name, weight in gpt2_weights(ours.state_dict(), config).items():
        torch.testing.assert_close(theirs.state_dict()[name], weight, rtol=1e-9, atol=1e-9)


def test_attention_with_written_out_weights_equals_the_fused_one() -> None:
    """Dropout takes the plain path; a rate that rounds to nothing makes it comparable."""
    config = JobConfig.model_validate(SMALL | {"dropout": 1e-9, "use_moe": True})
    model = built(config).double()
    tokens = torch.randint(VOCAB, (3, 24))
    dropout = Dropout(config, seed=1, step=0, windows=[0, 1, 2], device=torch.device("cpu"), dtype=torch.float64)
    torch.testing.assert_close(
        model(tokens, dropout=dropout).logits_BTV, model(tokens).logits_BTV, rtol=1e-10, atol=1e-12
    )


def test_dropout_touches_the_embedding_the_attention_and_both_branches() -> None:
    config = JobConfig.model_validate(SMALL | {"dropout": 0.5, "n_layer": 1})
    taken: list[tuple[int, ...]] = []

    class Watching(Dropout):
        def mask(self, layer: int, site: Site, n_planes: int, n_rows: int, n_columns: int) -> Tensor:
            taken.append((layer, site, n_planes, n_rows, n_columns))
            return super().mask(layer, site, n_planes, n_rows, n_columns)

    dropout = Watching(config, seed=1, step=0, windows=[0], device=torch.device("cpu"), dtype=torch.float32)
    built(config)(torch.zeros(1, 8, dtype=torch.long), dropout=dropout)
    assert taken == [
        (EMBEDDING, Site.ATTENTION_OUTPUT, 1, 8, 16),
        (0, Site.ATTENTION_WEIGHTS, 2, 8, 8),
        (0, Site.ATTENTION_OUTPUT, 1, 8, 16),
        (0, Site.MLP_OUTPUT, 1, 8, 16),
    ]


def test_the_same_seed_is_the_same_model_and_another_seed_another() -> None:
    config = JobConfig.model_validate(SMALL | {"use_moe": True})
    one, same, other = (built(config, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["transformer.wte.weight"], other["transformer.wte.weight"])


def test_an_ignored_target_costs_nothing_and_bfloat16_logits_are_widened() -> None:
    logits = torch.randn(2, 3, 5)
    losses = token_losses(logits, torch.tensor([[1, -1, 2], [0, 4, -1]]))
    assert losses[0, 1] == 0
    assert losses[0, 0] == pytest.approx(-logits[0, 0].log_softmax(-1)[1].item(), rel=1e-6)
    assert token_losses(logits.bfloat16(), torch.zeros(2, 3, dtype=torch.long)).dtype == torch.float32
