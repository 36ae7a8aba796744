"""Each kernel against its plain reference, forward and backward, over shapes that divide nothing evenly."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nanomoe.config import JobConfig
from nanomoe.data import Windows
from nanomoe.model.dropout import (
    Dropout,
    Site,
    cut,
    new_counters,
    plane_keys_on_device,
    scale,
    window_keys,
)
from nanomoe.model.moe import MoE

pytestmark = pytest.mark.triton

B, T, C, H = 2, 5, 24, 3
DTYPES = [torch.float32, torch.bfloat16]
CONFIG = JobConfig(n_layer=2, n_head=H, n_embd=C, dropout=0.3)
DROP = {"cut": cut(0.3), "scale": scale(0.3)}
KEYS = torch.tensor(window_keys(5, [0, 70_000], 2**63 - 1))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_()


def keys() -> Tensor:
    from nanomoe.training.steps.kernels.masks import plane_keys

    return plane_keys(CONFIG, KEYS.to(DEVICE))


def mask(site: Site, dtype: torch.dtype, planes: int, columns: int) -> Tensor:
    dropout = Dropout.of_window_keys(CONFIG, KEYS.to(DEVICE), dtype=dtype, counters=new_counters)
    return dropout.mask(1, site, planes, T, columns)


def assert_alike(
    ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], leaves: list[Tensor], dtype: torch.dtype
) -> None:
    """Results, and gradients for the same random gradient of the results, but for how often each is rounded."""
    given = [torch.randn_like(result) for result in ours]
    gradients = (torch.autograd.grad(results, leaves, given) for results in (ours, theirs))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, reference in zip([*ours, *next(gradients)], [*theirs, *next(gradients)], strict=True):
        assert mine.dtype == reference.dtype
        difference = (mine.float() - reference.float()).norm() / reference.float().norm()
        assert difference < tolerance


def test_keys_of_planes_are_those_of_the_host() -> None:
    assert torch.equal(keys().cpu(), plane_keys_on_device(CONFIG, KEYS))


def test_a_mask_keeps_the_very_elements_that_the_plain_path_keeps() -> None:
    from nanomoe.training.steps.kernels.branch import add_branch
    from nanomoe.training.steps.kernels.masks import words_of

    words = words_of(keys(), 1, Site.MLP_OUTPUT)
    ones = [torch.ones(n, device=DEVICE) for n in (B * T * C, C)]
    kept, _ = add_branch(None, ones[0].view(-1, C), None, words, ones[1], None, T=T, out=torch.float32, **DROP)
    assert torch.equal(kept, mask(Site.MLP_OUTPUT, torch.float32, 1, C).view(-1, C))
    assert 0 < (kept == 0).sum() < kept.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_whole", [True, False], ids=["everything", "nothing but the norm"])
def test_adding_a_branch(dtype: torch.dtype, is_whole: bool) -> None:
    from nanomoe.training.steps.kernels import branch
    from nanomoe.training.steps.kernels.masks import words_of

    y, weight = leaf(B * T, C, dtype=dtype), leaf(C)
    x, bias, norm_bias = (leaf(B * T, C), leaf(C), leaf(C)) if is_whole else (None, None, None)
    words = words_of(keys(), 1, Site.MLP_OUTPUT) if is_whole else None
    drops = mask(Site.MLP_OUTPUT, torch.float32, 1, C).view(-1, C) if is_whole else None
    ours = branch.add_branch(x, y, bias, words, weight, norm_bias, T=T, out=dtype, **DROP)
    theirs = branch.reference(x, y, bias, drops, weight, norm_bias, dtype)
    assert_alike(ours, theirs, [one for one in (x, y, bias, weight, norm_bias) if one is not None], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [T, 37], ids=["one block", "two blocks"])
def test_attention(dtype: torch.dtype, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanomoe.training.steps.kernels import attention
    from nanomoe.training.steps.kernels.masks import words_of

    monkeypatch.setattr("tests.nanomoe.training.steps.kernels.test_kernels.T", length)
    triple = leaf(B * length, 3 * C, dtype=dtype)
    ours = attention.attend(triple, words_of(keys(), 1, Site.ATTENTION_WEIGHTS), T=length, H=H, **DROP)
    theirs = attention.reference(triple, mask(Site.ATTENTION_WEIGHTS, dtype, H, length))
    assert_alike((ours,), (theirs,), [triple], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_bias_and_gelu(dtype: torch.dtype, has_bias: bool) -> None:
    from nanomoe.training.steps.kernels import gelu

    h, bias = leaf(7, 600, dtype=dtype), leaf(600) if has_bias else None
    leaves = [h] if bias is None else [h, bias]
    assert_alike((gelu.bias_gelu(h, bias),), (gelu.reference(h, bias),), leaves, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_output_layer_and_its_loss(dtype: torch.dtype) -> None:
    from nanomoe.training.steps.kernels import output

    x, weight = leaf(4, C, dtype=dtype), leaf(5_001, C, dtype=dtype)
    given = torch.tensor([0, -1, 5_000, 17], device=DEVICE), torch.tensor(7.0, device=DEVICE)
    ours, theirs = (function(x, weight, *given) for function in (output.output_loss, output.reference))
    assert_alike((ours,), (theirs,), [x, weight], dtype)


@pytest.mark.parametrize("n_tokens", [2, 30, 47])
def test_windows_are_gathered(n_tokens: int) -> None:
    from nanomoe.training.steps.kernels.window_tokens import gather

    windows = Windows(torch.arange(100, 100 + n_tokens, device=DEVICE), 12)
    numbers = torch.arange(windows.count, device=DEVICE).flip(0)
    for ours, theirs in zip(gather(windows, numbers), windows.gather(numbers), strict=True):
        assert torch.equal(ours, theirs)


NOISY = {"router_noise": True, "router_bias_update_rate": 1e-2}
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "renormalised, noise, bias": NOISY | {"norm_topk_prob": True},
    "sigmoid, noise, bias": NOISY | {"router_score": "sigmoid"},
    "sigmoid, not renormalised": {"router_score": "sigmoid", "norm_topk_prob": False},
    "one of many": {"k": 1, "n_experts": 40, "norm_topk_prob": False},
    "all": {"k": 3, "n_experts": 3},
}


@pytest.mark.parametrize("config", ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize("most_parts", [1024, 9], ids=["a row a part", "rows that share a part"])
def test_the_router(config: dict[str, Any], most_parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices and counts are the same; gates and losses are, and the gradient of all of them together."""
    from nanomoe.training.steps.kernels import router

    monkeypatch.setattr(router, "_MOST_PARTS", most_parts)
    monkeypatch.setattr(router, "_AT_ONCE", 32)
    n_tokens = 23
    parsed = JobConfig.model_validate({"use_moe": True, "n_experts": 5, "k": 2, "n_embd": C, "n_head": H} | config)
    moe = MoE(parsed).to(DEVICE)
    moe.init_weights(2)
    plain, (x, E) = moe.router, (leaf(n_tokens, C), parsed.n_experts)
    leaves = [x, *plain.parameters()]
    for weight in plain.parameters():
        weight.data.normal_()
    if plain.balance_bias is not None:
        plain.balance_bias.normal_()
    noise = torch.randn(n_tokens, E, device=DEVICE) if parsed.router_noise else None
    logits, ours = router.route_by(plain, x, noise)
    theirs_logits, probs, chosen, gates = plain(x, noise)
    counts = torch.bincount(chosen.flatten(), minlength=E)
    assert torch.equal(ours.chosen_TK, chosen)
    assert torch.equal(ours.counts_E, counts)
    torch.testing.assert_close((logits, ours.probs_TE), (theirs_logits, probs))
    aux = E * (counts.float() / chosen.numel() @ probs.mean(0))
    theirs = gates, aux, theirs_logits.logsumexp(-1).square().mean()
    assert_alike((ours.gates_TK, ours.aux_loss, ours.z_loss), theirs, leaves, torch.float32)


def test_of_equal_scores_the_router_chooses_the_lowest_index_and_of_none_that_is_a_number_some() -> None:
    from nanomoe.training.steps.kernels.router import route

    logits = torch.zeros(2, 5, device=DEVICE)
    logits[1, 3] = torch.nan
    chosen = route(logits, None, None, None, k=2, is_softmax=True, renormalises=True).chosen_TK
    assert chosen.tolist() == [[0, 1], [0, 1]]
