from nanomoe.training.early_stopping import ValidationHistory


def seen(*losses: float, min_delta: float = 0.0) -> ValidationHistory:
    history = ValidationHistory()
    for i, loss in enumerate(losses, 1):
        history = history.after(loss, 10 * i, min_delta=min_delta)
    return history


def test_every_evaluation_without_an_improvement_counts_and_an_improvement_starts_anew() -> None:
    assert seen(3.0) == ValidationHistory(3.0, 10, 0)
    assert seen(3.0, 3.1, 3.0) == ValidationHistory(3.0, 10, 2)
    assert seen(3.0, 3.1, 2.9) == ValidationHistory(2.9, 30, 0)


def test_an_improvement_is_one_of_more_than_the_least() -> None:
    assert seen(3.0, 2.95, 2.91, min_delta=0.1) == ValidationHistory(3.0, 10, 2)
    assert seen(3.0, 2.95, 2.89, min_delta=0.1) == ValidationHistory(2.89, 30, 0)


def test_a_loss_that_is_not_finite_is_no_improvement() -> None:
    assert seen(3.0, float("nan"), float("inf")).without_improvement == 2
