import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from nanomoe.config import JobConfig, ModelConfig, SampleConfig, TrainConfig


def test_the_defaults_are_the_reference_run() -> None:
    config = JobConfig()
    assert (config.epochs, config.lr, config.weight_decay, config.betas) == (500, 1e-4, 1e-2, (0.9, 0.95))
    assert (config.block_size, config.n_layer, config.n_head, config.n_embd) == (100, 4, 4, 128)
    assert (config.dropout, config.bias, config.use_moe) == (0.2, True, False)
    assert (config.cont_prefix_tokens, config.cont_max_new_tokens, config.temperature, config.top_k) == (10, 25, 0.1, 1)


def test_a_config_survives_json_unchanged() -> None:
    config = JobConfig(betas=(0.8, 0.99), use_moe=True, capacity_factor=1.25, max_steps=7)
    assert JobConfig.model_validate_json(config.model_dump_json()) == config
    assert JobConfig.model_validate(json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_layers": 4},
        {"lr": math.nan},
        {"lr": math.inf},
        {"lr": "0.1"},
        {"lr": True},
        {"epochs": 1.5},
        {"epochs": True},
        {"epochs": 0},
        {"early_stopping_patience": 3},
        {"early_stopping_patience": 0, "val_fraction": 0.1},
        {"eval_max_tokens": 255},
        {"bias": 1},
        {"betas": [0.9]},
        {"betas": [0.9, 1.0]},
        {"betas": [0.9, True]},
        {"dropout": 1.0},
        {"seed": -1},
        {"seed": 2**63},
        {"tokenizer": "a\x00b"},
        {"lr_schedule": "linear"},
        {"init_from": {"job_id": "", "checkpoint": 100}},
        {"init_from": {"job_id": "0" * 32, "checkpoint": 33}},
    ],
)
def test_what_is_not_a_config_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        JobConfig.model_validate(wrong)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"n_embd": 130}, r"n_embd \(130\) must be a multiple of n_head \(4\)"),
        ({"k": 9}, r"k \(9\) must be at most n_experts \(8\)"),
        ({"use_moe": True, "moe_stride": 5}, "none of the 4 layers is an MoE"),
        ({"use_moe": True, "expert_hidden_ratio": 0.3}, "38.4"),
        ({"min_lr": 1e-3}, r"min_lr \(0.001\) must be at most lr \(0.0001\)"),
    ],
)
def test_an_impossible_combination_is_refused_with_its_figures(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        JobConfig.model_validate(wrong)


def test_every_knob_is_declared_once_with_its_meaning() -> None:
    owners = [cls.model_fields for cls in (ModelConfig, TrainConfig, SampleConfig)]
    assert sum(map(len, owners)) == len(JobConfig.model_fields)
    assert all(field.description for field in JobConfig.model_fields.values())
