import torch
from hypothesis import given
from hypothesis import strategies as st

from nanomoe.config import JobConfig
from nanomoe.data import IGNORE, Order, Step, Windows
from nanomoe.plan import Plan


def test_a_short_text_is_one_window_shifted_by_one_with_its_last_target_ignored() -> None:
    windows = Windows(torch.tensor([5, 6, 7]), block_size=100)
    inputs_BT, targets_BT = windows.batch([0])
    assert inputs_BT.tolist() == [[5, 6, 7]]
    assert targets_BT.tolist() == [[6, 7, IGNORE]]


def test_the_last_window_of_a_long_text_ends_with_it_and_repeats_no_target() -> None:
    windows = Windows(torch.arange(10, 18), block_size=3)
    inputs_BT, targets_BT = windows.batch([0, 1, 2])
    assert inputs_BT.tolist() == [[10, 11, 12], [13, 14, 15], [14, 15, 16]]
    assert targets_BT.tolist() == [[11, 12, 13], [14, 15, 16], [IGNORE, IGNORE, 17]]


@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 7))
def test_every_token_but_the_first_is_a_target_exactly_once(n_tokens: int, block_size: int, per_batch: int) -> None:
    windows = Windows(torch.arange(n_tokens), block_size)
    assert windows.tokens == list(range(n_tokens))
    seen: list[int] = []
    for batch in windows.batches(per_batch):
        inputs_BT, targets_BT = windows.batch(batch)
        real = targets_BT != IGNORE
        assert (inputs_BT[real] == targets_BT[real] - 1).all()
        assert int(real.sum()) == windows.n_targets(batch)
        seen += targets_BT[real].tolist()
    assert seen == list(range(1, n_tokens))


@given(st.integers(2, 2000), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**63 - 1))
def test_an_epoch_sees_every_window_once_in_an_order_that_only_seed_and_epoch_decide(
    n_tokens: int, batch_size: int, accumulation: int, seed: int
) -> None:
    config = JobConfig(
        block_size=10, batch_size=batch_size, gradient_accumulation_steps=accumulation, epochs=3, seed=seed
    )
    plan = Plan.of(config, n_tokens)
    in_order = Order(config, plan)
    steps = [in_order.step(i) for i in range(plan.total_steps)]
    for epoch in (1, 2, 3):
        mine = [w for s in steps if s.epoch == epoch for w in s.windows]
        assert sorted(mine) == list(range(plan.n_windows))
    last = plan.total_steps - 1
    assert Order(config, plan).step(last) == steps[last]


def test_epochs_are_shuffled_differently() -> None:
    config = JobConfig(block_size=10, batch_size=1000, epochs=2)
    order = Order(config, Plan.of(config, 1000))
    assert order.step(0).windows != order.step(1).windows


def test_a_step_is_cut_into_micro_batches_without_losing_a_window() -> None:
    assert Step(1, [4, 2, 0, 1, 3]).micro_batches(2) == [[4, 2], [0, 1], [3]]
