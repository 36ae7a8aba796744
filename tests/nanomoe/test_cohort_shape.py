import subprocess
import sys
from typing import Any

import pytest

from nanomoe.cohort_shape import cohort_key
from nanomoe.config import JobConfig, ModelConfig

BASE: dict[str, Any] = {"use_moe": True}
OTHER: dict[str, Any] = {
    "block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 64, "bias": False, "use_moe": False, "n_experts": 4, "k": 1,
    "moe_stride": 1, "norm_topk_prob": False, "router_score": "sigmoid", "router_noise": True, "capacity_factor": 1.0,
    "n_shared_experts": 1, "expert_hidden_ratio": 2.0, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0,
    "router_bias_update_rate": 1e-3, "upcycle_noise": 0.1,
}  # fmt: skip
"""Another value of each field of a model."""


def key(changes: dict[str, Any], vocab_size: int = 8192, n_tokens: int = 5000) -> str | None:
    return cohort_key(JobConfig.model_validate(BASE | changes), vocab_size=vocab_size, n_tokens=n_tokens)


@pytest.mark.parametrize("field", sorted(set(ModelConfig.model_fields) - {"dropout", "tokenizer"}))
def test_jobs_whose_models_differ_are_of_two_shapes(field: str) -> None:
    assert key({field: OTHER[field]}) != key({})


@pytest.mark.parametrize("changes", [{"dropout": 0.5}, {"tokenizer": "bytes"}])
def test_a_model_may_differ_in_what_changes_no_tensor(changes: dict[str, Any]) -> None:
    assert key(changes) == key({}) is not None


def test_texts_of_many_windows_may_have_any_length() -> None:
    assert key({}, n_tokens=5000) == key({}, n_tokens=9000)
    assert key({}, n_tokens=500) == key({"batch_size": 5}, n_tokens=5000)  # five windows


def test_texts_of_a_single_window_may_differ_by_what_a_program_fills_up() -> None:
    assert key({}, n_tokens=65) == key({}, n_tokens=96) != key({}, n_tokens=97)
    assert key({}, n_tokens=64) != key({}, n_tokens=65)


def test_a_shape_is_the_same_in_every_process() -> None:
    code = "import sys; from nanomoe.cohort_shape import cohort_key as s; from nanomoe.config import JobConfig as C; "
    code += "print(s(C(), vocab_size=8192, n_tokens=87)); assert 'torch' not in sys.modules"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == cohort_key(JobConfig(), vocab_size=8192, n_tokens=87)
