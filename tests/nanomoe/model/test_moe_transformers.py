"""The layer against the mixtures of transformers: OLMoE, Qwen3-MoE, Mixtral.

Their experts are SwiGLU without biases, W_down (act(W_gate x) * W_up x). Ours is a special case of theirs with one more
channel, which holds a constant 1, and one more hidden channel: the biases become columns that meet the 1, every up
projection is that 1, and b_out, divided by GELU(1), comes out of the added hidden channel. Gradients map likewise.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanomoe.config import ModelConfig
from nanomoe.model.moe import MoE

C, E, F = 8, 5, 16
GELU_OF_1 = 0.5 * (1 + math.erf(1 / math.sqrt(2)))


# Their models are imported when a test builds one: every process that collects this file would pay for it.
def olmoe(k: int, normalise: bool) -> nn.Module:
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    return OlmoeSparseMoeBlock(
        OlmoeConfig(
            hidden_size=C + 1,
            intermediate_size=F + 1,
            hidden_act="gelu",
            num_experts=E,
            num_experts_per_tok=k,
            norm_topk_prob=normalise,
        )
    )


def qwen3(k: int, normalise: bool) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    return Qwen3MoeSparseMoeBlock(
        Qwen3MoeConfig(
            hidden_size=C + 1,
            moe_intermediate_size=F + 1,
            hidden_act="gelu",
            num_experts=E,
            num_experts_per_tok=k,
            norm_topk_prob=normalise,
        )
    )


def mixtral(k: int, normalise: bool) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    assert normalise, "Mixtral always normalises"
    return MixtralSparseMoeBlock(
        MixtralConfig(
            hidden_size=C + 1,
            intermediate_size=F + 1,
            hidden_act="gelu",
            num_local_experts=E,
            num_experts_per_tok=k,
        )
    )


def embed(moe: MoE, theirs: nn.Module) -> None:
    """Give their block our weights."""
    mine, block = dict(moe.named_parameters()), dict(theirs.named_parameters())
    assert set(block) == {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}
    with torch.no_grad():
        for tensor in block.values():
            tensor.zero_()
        block["gate.weight"][:, :C] = mine["router.weight"]
        gate_up = block["experts.gate_up_proj"]  # (E, 2 (F + 1), C + 1), the gate's rows first
        gate_up[:, :F, :C] = mine["experts.w_in"].mT
        gate_up[:, :F, C] = mine["experts.b_in"]
        gate_up[:, F:, C] = 1
        down = block["experts.down_proj"]  # (E, C + 1, F + 1)
        down[:, :C, :F] = mine["experts.w_out"].mT
        down[:, :C, F] = mine["experts.b_out"] / GELU_OF_1


def gradients_in_our_shapes(theirs: nn.Module) -> dict[str, Tensor]:
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    gate_up, down = grads["experts.gate_up_proj"], grads["experts.down_proj"]
    return {
        "router.weight": grads["gate.weight"][:, :C],
        "experts.w_in": gate_up[:, :F, :C].mT,
        "experts.b_in": gate_up[:, :F, C],
        "experts.w_out": down[:, :C, :F].mT,
        "experts.b_out": down[:, :C, F] / GELU_OF_1,
    }


@pytest.fixture
def float32_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round the router's softmax as transformers does: to float32, also in a float64 model."""
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda logits, dim, **_: softmax(logits.float(), dim))


def assert_equal(block: Any, k: int, normalise: bool, path: str, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(k)
    config = ModelConfig(
        use_moe=True, n_experts=E, k=k, n_embd=C, n_head=1, expert_hidden_ratio=F / C, norm_topk_prob=normalise
    )
    moe = MoE(config).double()
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    moe.path = path  # type: ignore[assignment]
    theirs = block(k, normalise).double()
    embed(moe, theirs)

    x = torch.randn(2, 11, C, generator=generator, dtype=torch.float64).requires_grad_()
    grad_y = torch.randn(2, 11, C, generator=generator, dtype=torch.float64)
    x_theirs = torch.cat([x.detach(), torch.ones(2, 11, 1, dtype=torch.float64)], -1).requires_grad_()
    y, _ = moe(x)
    y_theirs = theirs(x_theirs)
    y.backward(grad_y)
    y_theirs[..., :C].backward(grad_y)

    def close(ours: Tensor | None, other: Tensor | None) -> None:
        assert ours is not None
        assert other is not None
        torch.testing.assert_close(ours, other, rtol=tolerance, atol=tolerance)

    close(y, y_theirs[..., :C])
    assert not y_theirs[..., C].any()
    assert x_theirs.grad is not None
    close(x.grad, x_theirs.grad[..., :C])
    expected = gradients_in_our_shapes(theirs)
    assert expected.keys() == dict(moe.named_parameters()).keys()
    for name, parameter in moe.named_parameters():
        close(parameter.grad, expected[name])


CASES = [
    pytest.param(block, k, normalise, id=f"{block.__name__} k={k} {'normalised' if normalise else 'raw'}")
    for block, normalise in [(olmoe, True), (olmoe, False), (qwen3, True), (qwen3, False), (mixtral, True)]
    for k in (1, 2, 5)
]


@pytest.mark.usefixtures("float32_softmax")
@pytest.mark.parametrize("path", ["masked", "padded"])
@pytest.mark.parametrize(("block", "k", "normalise"), CASES)
def test_outputs_and_gradients_equal_transformers(block: Any, k: int, normalise: bool, path: str) -> None:
    assert_equal(block, k, normalise, path, tolerance=1e-12)


@pytest.mark.parametrize(("block", "k", "normalise"), CASES)
def test_a_router_wider_than_theirs_differs_by_their_rounding_only(block: Any, k: int, normalise: bool) -> None:
    assert_equal(block, k, normalise, "masked", tolerance=5e-6)
