"""The fast layer against the slow one, over all options and odd shapes; then what single formulas promise."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanomoe.config import ModelConfig
from nanomoe.model.moe import Assignments, ExpertPath, MoE, choose_expert_path, expert_capacity, not_grouped_because
from tests.nanomoe.model.moe_reference import Reference, gelu, reference_moe

CPU = torch.device("cpu")
PATHS: list[ExpertPath] = ["masked", "padded"]

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "k=1": {"k": 1},
    "k=1, raw gates": {"k": 1, "norm_topk_prob": False},
    "k=3, raw gates": {"k": 3, "norm_topk_prob": False},
    "sigmoid": {"router_score": "sigmoid"},
    "sigmoid, raw gates": {"router_score": "sigmoid", "norm_topk_prob": False},
    "noise": {"router_noise": True},
    "sigmoid with noise": {"router_score": "sigmoid", "router_noise": True},
    "capacity": {"capacity_factor": 0.7},
    "capacity rounded up to 1": {"capacity_factor": 0.01},
    "capacity that drops nothing": {"capacity_factor": 4.0},
    "shared experts": {"n_shared_experts": 2},
    "no bias": {"bias": False},
    "no bias, shared": {"bias": False, "n_shared_experts": 1},
    "balance bias": {"router_bias_update_rate": 0.01},
    "sigmoid with balance bias": {"router_score": "sigmoid", "router_bias_update_rate": 0.01},
    "one expert": {"n_experts": 1, "k": 1},
    "every expert": {"n_experts": 4, "k": 4},
    "narrow experts": {"expert_hidden_ratio": 0.5},
    "everything": {
        "k": 3,
        "router_score": "sigmoid",
        "router_noise": True,
        "capacity_factor": 0.8,
        "n_shared_experts": 2,
        "router_bias_update_rate": 0.01,
        "norm_topk_prob": False,
    },
}


def moe_config(**changes: Any) -> ModelConfig:
    chosen: dict[str, Any] = {
        "use_moe": True, "n_experts": 4, "k": 2, "n_embd": 6, "n_head": 1, "expert_hidden_ratio": 1.5
    }  # fmt: skip
    return ModelConfig(**(chosen | changes))


def random_moe(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> MoE:
    """Weights large enough that every formula leaves its mark."""
    moe = MoE(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*moe.parameters(), *moe.buffers()]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=dtype) * 0.4)
    return moe


def random_inputs(config: ModelConfig, B: int, T: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Any:
    """x (B, T, C), dropout masks (B, T, K + shared, C), noise (B * T, E) or None, and the gradient of y."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    x = normal(B, T, config.n_embd)
    keep = (normal(B, T, config.k + config.n_shared_experts, config.n_embd) > -0.8).to(dtype) / 0.8
    noise = normal(B * T, config.n_experts) if config.router_noise else None
    return x, keep, noise, normal(B, T, config.n_embd)


def weights_of(moe: MoE) -> dict[str, Tensor]:
    return dict(moe.named_parameters()) | dict(moe.named_buffers())


def all_gradients(objective: Tensor, moe: MoE, x: Tensor) -> dict[str, Tensor]:
    leaves = {"x": x} | dict(moe.named_parameters())
    gradients = torch.autograd.grad(objective, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True))


def assert_equals_reference(
    moe: MoE, B: int, T: int, *, tolerance: float, seed: int = 1, without_expert: int | None = None
) -> Reference:
    """One pass with dropout and noise, all of it and all gradients, against the reference in float64."""
    dtype = moe.router.weight.dtype
    x, keep, noise, grad_y = random_inputs(moe.config, B, T, seed, dtype)
    x.requires_grad_()
    y, routing = moe(x, keep=keep, noise_TE=noise, without_expert=without_expert)
    mine = all_gradients((y * grad_y).sum() + 0.3 * routing.aux_loss + 0.2 * routing.z_loss, moe, x)

    exact = MoE(moe.config).double()
    exact.load_state_dict(moe.state_dict())
    x64 = x.detach().double().requires_grad_()
    expected = reference_moe(
        moe.config,
        weights_of(exact),
        x64.flatten(0, 1),
        training=moe.training,
        keep_TNC=keep.double().flatten(0, 1),
        noise_TE=None if noise is None else noise.double(),
        without_expert=without_expert,
    )
    objective = (expected.outputs * grad_y.double().flatten(0, 1)).sum()
    theirs = all_gradients(objective + 0.3 * expected.aux_loss + 0.2 * expected.z_loss, exact, x64)

    def close(ours: Tensor, other: Tensor) -> None:
        torch.testing.assert_close(ours.double(), other, rtol=tolerance, atol=tolerance)

    assert routing.chosen_TK.tolist() == expected.chosen
    assert routing.counts_E.tolist() == expected.counts
    assert routing.dropped.item() == expected.dropped
    close(y.flatten(0, 1), expected.outputs)
    close(routing.logits_TE, expected.logits)
    close(routing.probs_TE, expected.probs)
    close(routing.gates_TK, torch.stack([torch.stack(gates) for gates in expected.gates]))
    close(routing.aux_loss, expected.aux_loss)
    close(routing.z_loss, expected.z_loss)
    assert mine.keys() == theirs.keys()
    for name in theirs:
        close(mine[name], theirs[name])
    return expected


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_equals_the_reference_in_float64(options: Any, training: bool, path: ExpertPath) -> None:
    moe = random_moe(moe_config(**options)).train(training)
    run_on(moe, path)
    assert_equals_reference(moe, 2, 5, tolerance=1e-10)


def run_on(moe: MoE, path: ExpertPath) -> None:
    """Evaluation leaves the choice to the rule, so that choice is replaced here: the path is what is tested."""
    experts, forward = moe.experts, moe.experts.forward
    experts.forward = lambda x_TC, assignments, _: forward(x_TC, assignments, path)  # type: ignore[method-assign]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("options", "B", "T"),
    [
        ({"n_experts": 1, "k": 1}, 1, 1),
        ({"n_experts": 7, "k": 7}, 1, 3),
        ({"n_experts": 16, "k": 1}, 1, 1),
        ({"n_experts": 9, "k": 3}, 1, 2),
        ({"n_embd": 1, "expert_hidden_ratio": 1.0}, 3, 1),
        ({"n_embd": 5, "expert_hidden_ratio": 3.0, "n_experts": 3}, 1, 17),
    ],
    ids=["all ones", "K = E", "one token", "T < E", "one channel", "odd widths"],
)
def test_odd_shapes_equal_the_reference_in_float64(options: Any, B: int, T: int, path: ExpertPath) -> None:
    moe = random_moe(moe_config(**options))
    run_on(moe, path)
    assert_equals_reference(moe, B, T, tolerance=1e-10)


@pytest.mark.parametrize("path", [*PATHS, "grouped"])
def test_an_expert_that_no_token_chose_gets_no_gradient(path: ExpertPath) -> None:
    moe = random_moe(moe_config(n_embd=8, n_experts=5, router_bias_update_rate=0.1), dtype=torch.float32)
    assert moe.router.balance_bias is not None
    moe.router.balance_bias.zero_()[2] = -9
    run_on(moe, path)
    expected = assert_equals_reference(moe, 1, 9, tolerance=1e-5)
    assert expected.counts[2] == 0
    y, _ = moe(random_inputs(moe.config, 1, 9, dtype=torch.float32)[0])
    y.sum().backward()
    assert all(p.grad is not None and not p.grad[2].any() for p in moe.experts.parameters())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_grouped_products_equal_the_reference_in_float32(options: Any) -> None:
    width = {"n_embd": 8, "expert_hidden_ratio": 2.0}
    moe = random_moe(moe_config(**({**options, **width})), dtype=torch.float32)
    run_on(moe, "grouped")
    assert_equals_reference(moe, 2, 5, tolerance=1e-5)


@pytest.mark.parametrize("path", [*PATHS, "grouped"])
def test_all_tokens_to_the_same_experts_equal_the_reference(path: ExpertPath) -> None:
    moe = random_moe(moe_config(n_embd=8, n_experts=8, router_bias_update_rate=0.1), dtype=torch.float32)
    assert moe.router.balance_bias is not None
    moe.router.balance_bias.copy_(torch.tensor([0.0, 5, 0, 0, 0, 5, 0, 0]))
    run_on(moe, path)
    assert assert_equals_reference(moe, 1, 20, tolerance=1e-5).counts == [0, 20, 0, 0, 0, 20, 0, 0]


@pytest.mark.parametrize("path", PATHS)
def test_without_an_expert_only_its_answers_are_missing(path: ExpertPath) -> None:
    moe = random_moe(moe_config(n_shared_experts=1)).eval()
    run_on(moe, path)
    for expert in range(4):
        assert_equals_reference(moe, 1, 7, tolerance=1e-10, without_expert=expert)


@settings(max_examples=40)
@given(st.data())
def test_any_config_and_shape_equals_the_reference(data: st.DataObject) -> None:
    draw = data.draw
    n_experts = draw(st.integers(1, 9), label="n_experts")
    config = moe_config(
        n_experts=n_experts,
        k=draw(st.integers(1, n_experts), label="k"),
        n_embd=draw(st.integers(1, 9), label="n_embd"),
        expert_hidden_ratio=float(draw(st.integers(1, 3), label="ratio")),
        bias=draw(st.booleans(), label="bias"),
        norm_topk_prob=draw(st.sampled_from([None, True, False]), label="norm_topk_prob"),
        router_score=draw(st.sampled_from(["softmax", "sigmoid"]), label="router_score"),
        router_noise=draw(st.booleans(), label="router_noise"),
        capacity_factor=draw(st.none() | st.floats(0.01, 3), label="capacity_factor"),
        n_shared_experts=draw(st.integers(0, 2), label="n_shared_experts"),
        router_bias_update_rate=draw(st.sampled_from([0.0, 0.1]), label="bias rate"),
    )
    moe = random_moe(config, seed=draw(st.integers(0, 99), label="seed")).train(draw(st.booleans(), label="training"))
    run_on(moe, draw(st.sampled_from(PATHS), label="path"))
    assert_equals_reference(moe, draw(st.integers(1, 2)), draw(st.integers(1, 8)), tolerance=1e-10)


def dense(moe: MoE, x: Tensor, expert: int = 0) -> Tensor:
    """The MLP that one expert is."""
    experts = moe.experts
    assert experts.b_in is not None
    assert experts.b_out is not None
    return gelu(x @ experts.w_in[expert] + experts.b_in[expert]) @ experts.w_out[expert] + experts.b_out[expert]


def test_one_expert_is_the_dense_mlp() -> None:
    moe = random_moe(moe_config(n_experts=1, k=1))
    x = random_inputs(moe.config, 2, 5)[0]
    torch.testing.assert_close(moe(x)[0], dense(moe, x), rtol=1e-12, atol=1e-12)


def test_equal_experts_with_gates_that_sum_to_one_are_the_dense_mlp() -> None:
    moe = random_moe(moe_config(n_experts=5, k=3))
    with torch.no_grad():
        for parameter in moe.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    x = random_inputs(moe.config, 2, 5)[0]
    torch.testing.assert_close(moe(x)[0], dense(moe, x), rtol=1e-12, atol=1e-12)


def test_ties_go_to_the_lowest_index() -> None:
    moe = random_moe(moe_config(n_experts=40, k=3))
    torch.nn.init.zeros_(moe.router.weight)
    assert moe(random_inputs(moe.config, 1, 50)[0])[1].chosen_TK.tolist() == [[0, 1, 2]] * 50


def test_the_balance_loss_is_one_at_perfect_balance_whatever_the_shape() -> None:
    for n_experts, k, T in [(1, 1, 3), (4, 2, 8), (8, 1, 16), (6, 3, 2)]:
        moe = random_moe(moe_config(n_experts=n_experts, k=k, n_embd=n_experts, expert_hidden_ratio=1.0))
        # Token t prefers experts t, t + 1, ...: each expert is chosen equally often, with equal probability.
        with torch.no_grad():
            ramp = torch.linspace(1, 0, n_experts)
            moe.router.weight.copy_(torch.stack([ramp.roll(t) for t in range(n_experts)]).T)
        x = torch.eye(n_experts, dtype=torch.float64).repeat(math.ceil(T / n_experts), 1)[None]
        assert moe(x)[1].aux_loss.item() == pytest.approx(1, abs=1e-12)


def test_the_balance_loss_is_e_when_everything_collapses_onto_one_expert() -> None:
    moe = random_moe(moe_config(n_experts=5, k=1))
    torch.nn.init.zeros_(moe.router.weight)
    with torch.no_grad():
        moe.router.weight[3] = 1000
    assert moe(torch.ones(1, 9, 6, dtype=torch.float64))[1].aux_loss.item() == pytest.approx(5, abs=1e-12)


@pytest.mark.parametrize(
    ("factor", "T", "k", "n_experts", "capacity"),
    [(1.0, 8, 2, 4, 4), (1.25, 8, 2, 4, 5), (1.0, 7, 1, 4, 2), (0.001, 8, 2, 4, 1), (1.0, 1, 1, 64, 1)],
)
def test_capacity_is_rounded_up_and_never_zero(factor: float, T: int, k: int, n_experts: int, capacity: int) -> None:
    assert expert_capacity(factor, T, k, n_experts) == capacity


def test_tokens_are_admitted_in_order_and_each_ones_choices_in_gate_order() -> None:
    assignments = Assignments.of(torch.tensor([[1, 0], [1, 2], [0, 1], [1, 0]]), 4)
    assert assignments.ranks().tolist() == [[0, 0], [1, 0], [1, 2], [3, 2]]
    assert assignments.counts_E.tolist() == [3, 4, 1, 0]


def test_the_balance_bias_moves_against_the_load_by_the_sign_of_the_excess() -> None:
    moe = random_moe(moe_config(router_bias_update_rate=0.25))
    assert moe.router.balance_bias is not None
    moe.router.balance_bias.zero_()
    moe.update_balance_bias(torch.tensor([9, 1, 5, 5]))
    assert moe.router.balance_bias.tolist() == [-0.25, 0.25, 0, 0]
    moe.update_balance_bias(torch.tensor([6, 6, 6, 6]))
    assert moe.router.balance_bias.tolist() == [-0.25, 0.25, 0, 0]


def test_repeated_bias_updates_spread_the_load() -> None:
    moe = random_moe(moe_config(router_bias_update_rate=0.001))
    assert moe.router.balance_bias is not None
    moe.router.balance_bias.zero_()
    with torch.no_grad():
        moe.router.weight.mul_(0.3)[0] += 0.3
    x = random_inputs(moe.config, 1, 256)[0] + 0.5
    assert moe(x)[1].counts_E.max() > 200
    for _ in range(120):
        moe.update_balance_bias(moe(x)[1].counts_E)
    assert moe(x)[1].counts_E.max() < 1.1 * 128


def test_the_balance_bias_is_in_the_file_only_when_it_is_used() -> None:
    names = {"router.weight", "experts.w_in", "experts.b_in", "experts.w_out", "experts.b_out"}
    assert set(MoE(moe_config()).state_dict()) == names
    assert set(MoE(moe_config(bias=False)).state_dict()) == {"router.weight", "experts.w_in", "experts.w_out"}
    extended = MoE(moe_config(router_bias_update_rate=0.1, router_noise=True, n_shared_experts=1)).state_dict()
    shared = {f"shared.{name}" for name in ("w_in", "b_in", "w_out", "b_out")}
    assert set(extended) == names | shared | {"router.noise_weight", "router.balance_bias"}


def test_initial_weights_follow_from_the_seed_and_biases_are_zero() -> None:
    config = moe_config(n_embd=64, router_noise=True, n_shared_experts=1, router_bias_update_rate=0.1)
    first, second = random_moe(config), random_moe(config, seed=5)
    for moe in (first, second):
        moe.init_weights(4, torch.Generator().manual_seed(7))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
        std = {"w_in": 0.02, "router.weight": 0.02, "w_out": 0.02 / math.sqrt(8)}
        expected = next((s for end, s in std.items() if name.endswith(end)), 0.0)
        assert tensor.std().item() == pytest.approx(expected, rel=0.1)


def test_bfloat16_autocast_keeps_the_router_in_float32_and_learns() -> None:
    config = moe_config(n_embd=16, n_experts=4, router_noise=True, n_shared_experts=1)
    moe = random_moe(config, dtype=torch.float32)
    x, keep, noise, _ = random_inputs(config, 2, 6, dtype=torch.float32)
    exact, routing = moe(x, keep=keep, noise_TE=noise)
    for path in (*PATHS, "grouped"):
        moe.path = path
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, rounded = moe(x, keep=keep, noise_TE=noise)
        assert torch.equal(rounded.logits_TE, routing.logits_TE)
        assert torch.equal(rounded.gates_TK, routing.gates_TK)
        assert y.dtype == torch.float32
        assert not torch.equal(y, exact)
        assert (y - exact).norm() < 0.02 * exact.norm()
        moe.zero_grad()
        (y.square().mean() + rounded.aux_loss).backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.any() for p in moe.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_router_computes_in_float32_or_the_wider_type(dtype: torch.dtype) -> None:
    moe = random_moe(moe_config(), dtype=dtype)
    y, routing = moe(random_inputs(moe.config, 1, 4, dtype=dtype)[0])
    assert routing.logits_TE.dtype == routing.gates_TK.dtype == torch.promote_types(dtype, torch.float32)
    assert y.dtype == dtype


def test_the_computing_path_follows_size_and_type_and_says_why() -> None:
    def choice(n_tokens: int, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[str, str]:
        return choose_expert_path(moe_config(n_embd=128, **changes), n_tokens, CPU, dtype)

    assert choice(87)[0] == "padded"
    assert choice(87, k=4) == ("masked", "every token goes to every expert")
    assert choice(1, n_experts=8)[0] == "grouped"
    assert choice(1, torch.bfloat16, n_experts=8)[0] == "padded"
    assert choice(87, torch.float64) == (
        "padded",
        "batched products over padded groups; grouped products take no float64",
    )
    assert "multiples of 16 bytes" in choose_expert_path(moe_config(n_embd=6), 1, CPU, torch.float32)[1]


@pytest.mark.parametrize(("n_embd", "hidden"), [(4, 8), (8, 4), (6, 8), (8, 6), (16, 16), (12, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_rule_for_grouped_products_is_torchs_own(n_embd: int, hidden: int, dtype: torch.dtype) -> None:
    x, weight = torch.ones(3, n_embd, dtype=dtype), torch.ones(2, n_embd, hidden, dtype=dtype)
    offsets = torch.tensor([1, 3], dtype=torch.int32)
    try:
        torch.nn.functional.grouped_mm(x, weight, offs=offsets)
        accepted = True
    except RuntimeError:
        accepted = False
    assert accepted == (not_grouped_because(n_embd, hidden, CPU, dtype) is None)


def test_a_path_that_cannot_run_says_why() -> None:
    moe = random_moe(moe_config())
    moe.path = "grouped"
    with pytest.raises(ValueError, match="grouped products take no float64"):
        moe(random_inputs(moe.config, 1, 4)[0])


def test_a_path_is_the_trainings_and_an_evaluation_in_another_type_still_runs() -> None:
    moe = random_moe(moe_config())
    moe.path = "grouped"
    moe.eval()(random_inputs(moe.config, 1, 4)[0])


def assert_equal_on(device: str, path: ExpertPath) -> None:
    """A layer there, beside the same one on the CPU: output, routing and every gradient. On a GPU nothing may wait."""
    config = moe_config(n_embd=64, n_experts=8, capacity_factor=1.0, n_shared_experts=1, router_noise=True)
    exact = random_moe(config, dtype=torch.float32)
    x, keep, noise, grad_y = random_inputs(config, 2, 48, dtype=torch.float32)
    there = [t.to(device) for t in (x, keep, noise, grad_y)]
    y, routing = exact(x.requires_grad_(), keep=keep, noise_TE=noise)
    gradients = all_gradients((y * grad_y).sum() + routing.aux_loss + routing.z_loss, exact, x)
    assert all(gradient.any() for gradient in gradients.values()), "equal zeros would show nothing"

    moe = MoE(config).to(device)
    moe.load_state_dict(exact.state_dict())
    moe.path = path
    x_there = there[0].detach().clone().requires_grad_()
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=path == "grouped"):
            y_there, routing_there = moe(x_there, keep=there[1], noise_TE=there[2])
        objective = (y_there * there[3]).sum() + routing_there.aux_loss + routing_there.z_loss
        gradients_there = all_gradients(objective, moe, x_there)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    tolerance = 0.02 if path == "grouped" else 1e-4
    assert torch.equal(routing_there.chosen_TK.cpu(), routing.chosen_TK)
    assert torch.equal(routing_there.dropped.cpu(), routing.dropped)
    assert (y_there.cpu() - y).norm() <= tolerance * y.norm()
    for name, gradient in gradients.items():
        assert (gradients_there[name].cpu() - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["masked", "grouped"])
def test_the_gpu_equals_the_cpu_and_never_waits(path: ExpertPath) -> None:
    assert_equal_on("cuda", path)


@pytest.mark.parametrize("path", PATHS)
def test_what_is_compared_on_a_gpu_is_equal_on_the_cpu(path: ExpertPath) -> None:
    assert_equal_on("cpu", path)
