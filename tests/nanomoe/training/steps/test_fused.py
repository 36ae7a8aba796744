"""The fused step against the eager one, which is autograd on the plain model."""

import copy
import math
from typing import Any

import pytest
import torch

from nanomoe import checkpoint
from nanomoe.model.dropout import Dropout
from nanomoe.model.gpt import token_losses
from nanomoe.plan import OutOfMemory
from nanomoe.training.loop import Happened, LossNotFinite, Steps, Stopped, train
from nanomoe.training.run import Recorded, Snapshot, Warned
from nanomoe.training.steps import fused, micro_batch
from nanomoe.training.steps.fused import FusedStep
from tests.nanomoe.training.steps.runs import TEXT, StopAt, checkpoints, curve, start

CONFIGS: dict[str, dict[str, Any]] = {
    "dropout": {},
    "no dropout": {"dropout": 0.0},
    "no bias": {"bias": False},
    "clipped": {"grad_clip": 0.5},
    "accumulated, the last ragged": {"batch_size": 2, "gradient_accumulation_steps": 3},
    "one window": {"block_size": 400},
    "held out": {"val_fraction": 0.3},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_are_those_of_autograd_in_float64(config: dict[str, Any], n_threads: int) -> None:
    run = start(config)
    plain = copy.deepcopy(run.model).double()
    step = run.order.step(0)
    inputs, targets = run.windows.batch(step.windows)
    dropout = Dropout(
        run.config, seed=42, step=0, windows=step.windows, device=torch.device("cpu"), dtype=torch.float64
    )
    loss = token_losses(plain(inputs, dropout=dropout).logits_BTV, targets).sum() / (targets != -1).sum()
    loss.backward()
    run._gradient(step)
    assert isinstance(run.step, FusedStep)
    gradients = run.step.gradients()
    assert len(gradients) == len(list(plain.parameters()))
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        difference = (gradients[name].double() - parameter.grad).norm() / parameter.grad.norm()
        assert difference < 1e-6, name
    assert run.step.update().loss.item() == pytest.approx(loss.item(), rel=1e-6)


def test_gradients_are_the_same_where_the_output_layer_takes_few_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch, n_threads: int
) -> None:
    def gradients() -> dict[str, torch.Tensor]:
        run = start({})
        run._gradient(run.order.step(0))
        assert isinstance(run.step, FusedStep)
        return {name: gradient.clone() for name, gradient in run.step.gradients().items()}

    whole = gradients()
    monkeypatch.setattr(micro_batch, "_MOST_LOGITS", 256 * 50)
    for name, cut in gradients().items():
        torch.testing.assert_close(cut, whole[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_loss_curves_equal_the_eager_ones(config: dict[str, Any]) -> None:
    """Over 10 steps at a high rate, and over 100 at a low one: rounding grows with every step."""
    for lr, n_steps, tolerance in ((5e-3, 10, 1e-5), (1e-4, 100, 1e-4)):
        ours, reference = (curve(start(config | {"lr": lr}, path), n_steps) for path in ("fused", "eager"))
        assert ((ours - reference) / reference).abs().max() < tolerance


def test_norms_and_weights_equal_the_eager_ones() -> None:
    """With a weight decay that could not be missed."""
    config = {"weight_decay": 5.0, "lr": 1e-2, "eps": 1e-3}
    ours, reference = start(config), start(config, "eager")
    for _ in range(5):
        torch.testing.assert_close(ours.train_step()[1], reference.train_step()[1], rtol=1e-4, atol=0)
    for (name, one), other in zip(ours.model.named_parameters(), reference.model.parameters(), strict=True):
        assert ((one - other).norm() / other.norm()) < 1e-4, name


def test_in_bfloat16_the_loss_ends_within_a_percent_of_float32s() -> None:
    config = {"epochs": 60, "lr": 3e-3, "cont_max_new_tokens": 4}
    losses = {
        precision: [event for event in train(start(config | {"precision": precision})) if isinstance(event, Recorded)]
        for precision in ("float32", "bfloat16")
    }
    end, narrow = (losses[precision][-1].metrics.loss for precision in ("float32", "bfloat16"))
    assert end < 2.0
    assert narrow == pytest.approx(end, rel=1e-2)


@pytest.mark.parametrize(
    "config", [{}, {"precision": "bfloat16", "val_fraction": 0.3}, {"gradient_accumulation_steps": 2, "batch_size": 2}]
)
def test_a_run_repeats_byte_for_byte_and_so_does_one_that_was_stopped(config: dict[str, Any], n_threads: int) -> None:
    config = config | {"epochs": 3, "lr": 1e-2, "cont_max_new_tokens": 4}
    expected = checkpoints(list(train(start(config))))
    assert list(expected) == [0, 25, 50, 75, 100]
    assert checkpoints(list(train(start(config)))) == expected
    for stopped_after in (1, 3):
        first = start(config)
        before = list(train(first, StopAt(first, stopped_after)))
        assert isinstance(before[-1], Stopped)
        snapshot = next(event for event in reversed(before) if isinstance(event, Snapshot))
        after = list(train(start(config, resume=snapshot.files)))
        assert checkpoints(before) | checkpoints(after) == expected


def test_a_snapshot_can_be_gone_on_from_by_the_eager_step_and_back() -> None:
    fused_run, eager_run = start({}), start({}, "eager")
    for run in (fused_run, eager_run):
        run.train_step()
    assert set(fused_run.step.tensors()) == set(eager_run.step.tensors())
    for path, snapshot in (("eager", fused_run.snapshot()), ("fused", eager_run.snapshot())):
        resumed = start({}, path, resume=snapshot.files)  # type: ignore[arg-type]
        torch.testing.assert_close(resumed.train_step(), start_and_go(2), rtol=1e-4, atol=0)


def start_and_go(n_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    run = start({}, "eager")
    for _ in range(n_steps - 1):
        run.train_step()
    return run.train_step()


def test_a_micro_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = start({"batch_size": 8})
    tight = start({"batch_size": 8})
    make = fused.MicroBatch

    def workspace(B: int, *others: Any) -> fused.MicroBatch:
        if B > 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
        return make(B, *others)

    monkeypatch.setattr(fused, "MicroBatch", workspace)
    loss, norm = tight.train_step()
    assert tight.progress.micro_batch == 2
    assert [warned.code for warned in tight.warnings].count("micro_batch_halved") == 2
    monkeypatch.setattr(fused, "MicroBatch", make)
    expected_loss, expected_norm = whole.train_step()
    torch.testing.assert_close((loss, norm), (expected_loss, expected_norm), rtol=1e-5, atol=0)
    monkeypatch.setattr(fused, "MicroBatch", lambda *_: workspace(4))
    with pytest.raises(OutOfMemory):
        start({"batch_size": 1}).train_step()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_loss_that_is_not_finite_ends_training_at_its_step(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanomoe.training.loop.REPORT_SECONDS", 0.0)
    run = start({"epochs": 50, "precision": precision})
    happened: list[Happened] = []

    def poisoned_after_step_5() -> None:
        for event in train(run):
            happened.append(event)
            if run.progress.step == 5 and isinstance(event, Steps):
                run.model.transformer.ln_f.weight.data[3] = math.nan

    with pytest.raises(LossNotFinite, match="at step 6 the loss is nan"):
        poisoned_after_step_5()
    assert not any(isinstance(event, Warned) for event in happened)


def test_the_text_decides_how_much_is_computed_and_not_the_context() -> None:
    """A text shorter than the context leaves the later positions without a gradient, and lets them decay."""
    run, reference = (start({"block_size": 500, "weight_decay": 1.0}, path) for path in ("fused", "eager"))
    run.train_step()
    reference.train_step()
    ours, theirs = run.model.transformer.wpe.weight, reference.model.transformer.wpe.weight
    assert torch.equal(ours[len(TEXT) :], theirs[len(TEXT) :])


def test_weights_are_written_as_those_of_any_run() -> None:
    ours, reference = start({}).snapshot().files, start({}, "eager").snapshot().files
    assert ours[checkpoint.WEIGHTS] == reference[checkpoint.WEIGHTS]
    assert ours.keys() == reference.keys()
