import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomoe.config import PERCENTS, JobConfig
from nanomoe.plan import OutOfMemory, Plan, TextTooShort


def test_the_reference_run_records_its_quarters_at_125_250_375_and_500() -> None:
    assert Plan.of(JobConfig(), 87).quarters == {0: 0, 125: 25, 250: 50, 375: 75, 500: 100}


def test_quarters_that_share_a_step_keep_the_highest_percent() -> None:
    assert Plan.of(JobConfig(epochs=1), 50).quarters == {0: 0, 1: 100}
    assert Plan.of(JobConfig(epochs=2), 50).quarters == {0: 0, 1: 50, 2: 100}
    assert Plan.of(JobConfig(epochs=3), 50).quarters == {0: 0, 1: 25, 2: 50, 3: 100}


def test_max_steps_ends_a_plan_in_the_middle_of_an_epoch() -> None:
    plan = Plan.of(JobConfig(batch_size=2, gradient_accumulation_steps=2, epochs=10, max_steps=7), 1000)
    assert (plan.n_windows, plan.steps_per_epoch, plan.total_steps) == (10, 3, 7)
    assert [plan.epoch_of(step) for step in (0, 1, 3, 4, 7)] == [0, 1, 1, 2, 3]


@pytest.mark.parametrize(("n_tokens", "windows"), [(2, 1), (100, 1), (101, 1), (102, 2), (201, 2), (202, 3)])
def test_a_text_that_fits_the_context_is_one_window_and_a_longer_one_is_cut(n_tokens: int, windows: int) -> None:
    assert Plan.of(JobConfig(block_size=100), n_tokens).n_windows == windows


def test_at_least_two_tokens_are_held_out_and_at_least_two_are_trained_on() -> None:
    assert Plan.of(JobConfig(val_fraction=0.01), 87).n_val_tokens == 2
    assert Plan.of(JobConfig(val_fraction=0.25), 87).n_val_tokens == 21
    with pytest.raises(TextTooShort, match=r"the text has 3, of which val_fraction 0\.1 holds out 2"):
        Plan.of(JobConfig(val_fraction=0.1), 3)
    with pytest.raises(TextTooShort, match="the text has 1"):
        Plan.of(JobConfig(), 1)


def test_a_micro_batch_is_halved_down_to_one_window() -> None:
    config = JobConfig(batch_size=64, block_size=32)
    plan = Plan.of(config, 200)  # 7 windows
    assert [plan.halved(size, config) for size in (64, 7, 4, 3, 2)] == [4, 4, 2, 2, 1]
    with pytest.raises(OutOfMemory, match="not even one window of 32 tokens"):
        plan.halved(1, config)
    with pytest.raises(OutOfMemory, match="not even one window of 20 tokens"):
        Plan.of(config, 20).halved(64, config)


def test_a_capacity_that_is_shared_by_a_micro_batch_forbids_to_halve_it() -> None:
    config = JobConfig(batch_size=4, block_size=32, use_moe=True, capacity_factor=1.0)
    with pytest.raises(OutOfMemory, match="capacity_factor"):
        Plan.of(config, 200).halved(4, config)


@given(st.integers(1, 40), st.integers(2, 5000), st.integers(1, 64), st.integers(1, 5), st.integers(1, 5))
def test_a_plan_always_starts_at_0_and_ends_at_100_percent(
    epochs: int, n_tokens: int, block_size: int, batch_size: int, accumulation: int
) -> None:
    config = JobConfig(
        epochs=epochs, block_size=block_size, batch_size=batch_size, gradient_accumulation_steps=accumulation
    )
    plan = Plan.of(config, n_tokens)
    quarters = plan.quarters
    assert quarters[0] == 0
    assert quarters[plan.total_steps] == 100
    assert list(quarters) == sorted(quarters)
    assert set(quarters.values()) <= set(PERCENTS)
    assert list(quarters.values()) == sorted(quarters.values())


def eval_max_tokens(n_tokens: int, **config: object) -> int:
    parsed = JobConfig.model_validate(config)
    return Plan.of(parsed, n_tokens).eval_max_tokens(parsed)


@pytest.mark.parametrize(
    ("n_tokens", "config", "expected"),
    [
        (87, {}, 8192),  # 43,000 trained targets
        (1_000_001, {"epochs": 1}, 30_000),
        (1_000_001, {"epochs": 2}, 60_000),
        (1_000_001, {"epochs": 3}, 65_536),
        (1_000_001, {"max_steps": 400, "batch_size": 12, "block_size": 100}, 14_400),  # 3 % of 480,000
        (1_000_001, {"epochs": 2, "max_steps": 834 + 10}, 30_360),  # an epoch has 834 steps, the last not full
        (1_000_001, {"epochs": 1, "val_fraction": 0.5}, 15_000),
        (1_000_001, {"epochs": 1, "max_steps": 100}, 8192),
        (1_000_001, {"epochs": 3, "eval_max_tokens": 256}, 256),
        (1_000_001, {"epochs": 3, "eval_max_tokens": 1_000_000}, 1_000_000),
    ],
)
def test_an_evaluation_measures_3_percent_of_what_is_trained_on_within_bounds_unless_the_config_says_otherwise(
    n_tokens: int, config: dict[str, object], expected: int
) -> None:
    assert eval_max_tokens(n_tokens, **config) == expected


@given(
    st.integers(2, 5000), st.integers(1, 50), st.integers(1, 9), st.integers(1, 3), st.integers(1, 5),
    st.none() | st.integers(1, 50),
)  # fmt: skip
def test_the_targets_trained_on_are_those_of_the_steps(
    n_tokens: int, block: int, batch: int, accumulation: int, epochs: int, max_steps: int | None
) -> None:
    config = JobConfig(
        block_size=block, batch_size=batch, gradient_accumulation_steps=accumulation, epochs=epochs,
        max_steps=max_steps,
    )  # fmt: skip
    plan = Plan.of(config, n_tokens)
    full = epochs if max_steps is None else plan.total_steps // plan.steps_per_epoch
    at_least = full * (n_tokens - 1)
    assert at_least <= plan.n_trained_targets(config) <= at_least + n_tokens - 1
    if plan.total_steps % plan.steps_per_epoch == 0:
        assert plan.n_trained_targets(config) == at_least
