import pytest

from nanomoe.config import JobConfig
from nanomoe.model.size import flops_per_token, n_params, training_bytes

SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "bias": False}


def test_flops_are_six_per_weight_that_a_token_meets_and_the_attention_products() -> None:
    config = JobConfig.model_validate(SMALL)
    attention, mlp, norms, output = 4 * 8 * 8, 8 * 8 * 8, 3 * 8, 50 * 8
    assert flops_per_token(config, 50, context=10) == 6 * (attention + mlp + norms + output) + 12 * 8 * 10


def test_flops_of_a_mixture_count_the_router_and_k_experts_but_not_the_idle_ones() -> None:
    def flops(n_experts: int, k: int) -> int:
        mixture = {"use_moe": True, "moe_stride": 1, "n_experts": n_experts, "k": k}
        return flops_per_token(JobConfig.model_validate(SMALL | mixture), 50, context=10)

    router_row, expert = 8, 8 * 8 * 8
    assert flops(8, 2) - flops(4, 2) == 6 * 4 * router_row
    assert flops(8, 3) - flops(8, 2) == 6 * expert


@pytest.mark.parametrize("changes", [{"n_embd": 16}, {"batch_size": 24}, {"use_moe": True, "moe_stride": 1}])
def test_training_needs_more_memory_for_a_larger_model_or_batch(changes: dict[str, object]) -> None:
    small, large = (JobConfig.model_validate(SMALL | c) for c in ({}, changes))
    assert training_bytes(large, 50, 1000) > training_bytes(small, 50, 1000) >= 16 * n_params(small, 50)
