import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors

from nanomoe import checkpoint
from nanomoe.config import JobConfig
from nanomoe.evaluation.reader import BATCH_BYTES
from nanomoe.model.dropout import Dropout
from nanomoe.model.gpt import token_losses
from nanomoe.plan import OutOfMemory
from nanomoe.tokenizer import load_tokenizer
from nanomoe.training.loop import Happened, LossNotFinite, Steps, Stopped, StopReason, Undisturbed, train
from nanomoe.training.run import Recorded, Run, Snapshot, Warned, prepare
from nanomoe.training.steps import fused_reader

TEXT = "o rato roeu a roupa do rei de roma, e a rainha com raiva resolveu remendar. " * 4
SHAPE = {"tokenizer": "bytes", "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 16}
TINY = SHAPE | {"lr": 1e-2, "epochs": 3, "batch_size": 4, "cont_max_new_tokens": 4}
MOE = {"use_moe": True, "n_experts": 4, "moe_stride": 1, "capacity_factor": 1.0, "router_noise": True}
BIAS = {"use_moe": True, "n_experts": 4, "router_bias_update_rate": 1e-2, "gradient_accumulation_steps": 2}


def start(
    config: dict[str, object], resume: dict[str, bytes] | None = None, parent: dict[str, torch.Tensor] | None = None
) -> Run:
    parsed = JobConfig.model_validate(TINY | config)
    return prepare(parsed, TEXT, load_tokenizer("bytes"), parent=parent, resume=resume).run


def checkpoints(happened: Iterator[Happened] | list[Happened]) -> dict[int, dict[str, bytes]]:
    return {event.percent: event.files for event in happened if isinstance(event, Recorded)}


class StopAt(Undisturbed):
    """Asks for a stop once a step is done, and for a snapshot after each step."""

    def __init__(self, run: Run, step: int, reason: StopReason = "drain") -> None:
        self.run, self.step, self.reason = run, step, reason

    def stop(self) -> StopReason | None:
        return self.reason if self.run.progress.step >= self.step else None

    def snapshot_due(self) -> bool:
        return True


@pytest.mark.parametrize(
    "config",
    [{}, MOE, BIAS, MOE | {"eval_max_tokens": 256}, {"val_fraction": 0.3, "precision": "bfloat16"}],
)
def test_a_run_resumed_from_every_step_ends_byte_for_byte_as_an_undisturbed_one(config: dict[str, object]) -> None:
    expected = checkpoints(train(start(config)))
    assert list(expected) == [0, 25, 50, 75, 100]
    found: dict[int, dict[str, bytes]] = {}
    resume = None
    for step in range(1, start(config).plan.total_steps + 2):  # the last attempt does what is due after the last step
        run = start(config, resume=resume)
        happened = list(train(run, StopAt(run, step)))
        for percent, files in checkpoints(happened).items():
            assert files == expected[percent], f"{percent} %, in the attempt that was to stop after step {step}"
            found[percent] = files
        if isinstance(happened[-1], Stopped):
            resume = next(event for event in reversed(happened) if isinstance(event, Snapshot)).files
    assert found == expected


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    one, same, other = (checkpoints(train(start({"seed": seed})))[100] for seed in (1, 1, 2))
    assert one == same
    assert one[checkpoint.WEIGHTS] != other[checkpoint.WEIGHTS]


def test_steps_are_reported_once_each_and_in_order() -> None:
    steps = [event for event in train(start({})) if isinstance(event, Steps)]
    numbers = [n for event in steps for n in event.step]
    assert numbers == list(range(1, start({}).plan.total_steps + 1))
    for event in steps:
        assert len(event.train_loss) == len(event.lr) == len(event.grad_norm) == len(event.step)


def test_the_loss_falls_and_the_train_loss_of_a_checkpoint_is_that_of_its_last_step() -> None:
    happened = list(train(start({"epochs": 20})))
    recorded = {event.percent: event for event in happened if isinstance(event, Recorded)}
    train_loss = {
        step: loss
        for event in happened
        if isinstance(event, Steps)
        for step, loss in zip(event.step, event.train_loss, strict=True)
    }
    losses = [event.metrics.loss for event in recorded.values()]
    assert losses[0] == pytest.approx(math.log(256), abs=0.1)
    assert losses[-1] < losses[0] - 2
    assert recorded[0].metrics.train_loss is None
    assert recorded[0].tok_per_sec is None
    assert recorded[50].metrics.train_loss == train_loss[recorded[50].metrics.step]
    assert recorded[50].tok_per_sec is not None


@pytest.mark.parametrize("moe", [{}, {"use_moe": True, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}])
def test_a_step_cut_into_micro_batches_has_the_gradient_of_the_whole(moe: dict[str, object]) -> None:
    """Dropout included: a window's masks do not depend on the micro-batch in which it travels."""
    whole = start({"batch_size": 8} | moe)
    cut = start({"batch_size": 2, "gradient_accumulation_steps": 4} | moe)
    whole_loss, whole_norm = whole.train_step()
    cut_loss, cut_norm = cut.train_step()
    torch.testing.assert_close(cut_loss, whole_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(cut_norm, whole_norm, rtol=1e-5, atol=1e-6)


def test_a_step_equals_the_plain_formula() -> None:
    """Sum of the losses of the step's targets over their number, clipped to the norm, and AdamW written out."""
    config = {"grad_clip": 0.5, "weight_decay": 0.1, "warmup_steps": 4}
    run, plain = start(config), start(config)
    order = plain.order.step(0)
    inputs, targets = plain.windows.batch(order.windows)
    dropout = Dropout(
        plain.config, seed=42, step=0, windows=order.windows, device=torch.device("cpu"), dtype=torch.float32
    )
    loss = token_losses(plain.model(inputs, dropout=dropout).logits_BTV, targets).sum() / (targets != -1).sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in plain.model.named_parameters() if p.grad is not None}
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    scale = min(1.0, 0.5 / (norm.item() + 1e-6))
    weights = {name: p.detach().clone() for name, p in plain.model.named_parameters()}

    seen_loss, seen_norm = run.train_step()
    torch.testing.assert_close(seen_loss, loss.detach())
    torch.testing.assert_close(seen_norm, norm)
    lr = 1e-2 / 4
    for name, p in run.model.named_parameters():
        g = gradients[name] * scale
        # At the first step the bias-corrected moments are the gradient and its square.
        decayed = weights[name] * (1 - lr * 0.1) if p.dim() >= 2 else weights[name]
        torch.testing.assert_close(p.detach(), decayed - lr * g / (g.abs() + 1e-8), rtol=1e-4, atol=1e-6)


def test_without_the_manifest_a_run_goes_on_from_a_flipped_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = start({})
    snapshot = next(event for event in train(stopped, StopAt(stopped, 2)) if isinstance(event, Snapshot))
    _, sha256 = checkpoint.write(tmp_path / "s", snapshot.files)
    weights = tmp_path / "s" / checkpoint.WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-2] ^= 0x40  # of the last weight's mantissa
    weights.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointDamaged):
        checkpoint.open(tmp_path / "s", sha256).read_all()
    monkeypatch.setattr(checkpoint, "read_file", lambda folder, entry: folder.read(entry.name))
    resumed = start({}, resume=checkpoint.open(tmp_path / "s", sha256).read_all())
    undisturbed = start({}, resume=snapshot.files)
    assert list(train(resumed))[-1] != list(train(undisturbed))[-1]


def test_training_ends_early_once_the_evaluation_perplexity_is_low_enough() -> None:
    happened = list(train(start({"epochs": 1000, "stop_at_perplexity": 12.0, "dropout": 0.0})))
    last = [event for event in happened if isinstance(event, Recorded)][-1]
    assert last.percent == 100
    assert last.metrics.stopped_early is True
    assert last.metrics.perplexity <= 12.0
    assert last.metrics.step < start({"epochs": 1000}).plan.total_steps
    assert last.metrics.step % start({}).plan.steps_per_epoch == 0


EARLY = {
    "epochs": 20, "val_fraction": 0.3, "early_stopping_patience": 3, "early_stopping_min_delta": 100.0,
    "eval_interval": 2,
}  # fmt: skip
"""Only the first evaluation, after step 2, improves by so much: training ends three evaluations later."""


def test_training_ends_early_once_the_validation_loss_has_not_improved_for_so_many_evaluations() -> None:
    happened = list(train(start(EARLY)))
    recorded = [event.metrics for event in happened if isinstance(event, Recorded)]
    last = recorded[-1]
    assert (last.percent, last.step, last.stopped_early) == (100, 8, True)
    assert last.best_val_step == 2
    assert last.best_val_loss > last.val_loss
    assert "lowest val_loss" in checkpoint.stopped_early_reason(last)
    assert "best_val_loss" not in recorded[0].to_file()


def test_the_validation_loss_that_improves_never_ends_training() -> None:
    happened = list(train(start(EARLY | {"epochs": 6, "early_stopping_min_delta": 0.0, "early_stopping_patience": 2})))
    last = [event.metrics for event in happened if isinstance(event, Recorded)][-1]
    assert not last.stopped_early
    assert last.best_val_loss == last.val_loss


def test_a_run_that_ends_early_does_so_at_the_same_step_and_with_the_same_bytes_after_a_resume() -> None:
    expected = checkpoints(train(start(EARLY)))
    for stopped_after in range(1, 8):
        first = start(EARLY)
        before = list(train(first, StopAt(first, stopped_after)))
        snapshot = next(event for event in reversed(before) if isinstance(event, Snapshot))
        found = checkpoints(before) | checkpoints(train(start(EARLY, resume=snapshot.files)))
        assert found == expected, f"stopped after step {stopped_after}"


class StopAtCall(Undisturbed):
    """Asks for a stop from the n-th time on that it is asked, counted once training has begun."""

    def __init__(self, run: Run, n: int, reason: StopReason = "pause") -> None:
        self.run, self.left, self.reason = run, n, reason

    def stop(self) -> StopReason | None:
        self.left -= self.run.progress.step > 0
        return self.reason if self.left < 0 else None


@pytest.mark.parametrize(
    ("config", "apart"), [(EARLY | {"epochs": 4, "early_stopping_patience": 2}, 7), (MOE | {"epochs": 2}, 7)]
)
def test_a_run_that_was_stopped_between_any_two_batches_of_an_evaluation_ends_with_the_same_bytes(
    config: dict[str, object], apart: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BATCH_BYTES, "cpu", 1)  # a window a batch
    monkeypatch.setattr(fused_reader, "_TOKENS", 1)
    expected = checkpoints(train(start(config)))
    in_evaluation = n = 0
    while True:
        run = start(config)
        before = list(train(run, StopAtCall(run, n)))
        if not isinstance(before[-1], Stopped):
            break
        snapshot = before[-2]
        assert isinstance(snapshot, Snapshot)
        in_evaluation += json.loads(snapshot.files[checkpoint.RESUME_STATE])["evaluation_is_due"]
        found = checkpoints(before) | checkpoints(train(start(config, resume=snapshot.files)))
        assert found == expected, f"stopped at call {n}"
        n += apart
    assert in_evaluation > 5


def test_a_cancel_ends_an_evaluation_between_two_batches_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run = start({})
    total = run.plan.total_steps
    monkeypatch.setattr(Run, "record", endless_from(total, threading.Event()))
    happened = list(train(run, StopAt(run, total, "cancel")))
    assert happened[-1] == Stopped("cancel", total)
    assert list(checkpoints(happened)) == [0, 25, 50, 75]


def endless_from(step: int, ended: threading.Event) -> Callable[..., Any]:
    """`Run.record` with an evaluation that ends only when it is stopped, from the checkpoint after `step` on."""
    record = Run.record

    def evaluate(run: Run, percent: int, *, raise_if_stopped: Callable[[], None], **options: Any) -> Any:
        try:
            while run.progress.step >= step:
                raise_if_stopped()
                time.sleep(0.001)
        finally:
            ended.set()
        return record(run, percent, raise_if_stopped=raise_if_stopped, **options)

    return evaluate


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("reason", ["cancel", "pause"])
def test_the_first_evaluation_ends_with_the_run_that_no_longer_waits_for_it(
    reason: StopReason, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After step 3 is the first quarter, which waits for it."""
    ended, record = threading.Event(), Run.record
    run = start({})
    with monkeypatch.context() as patched:
        patched.setattr(Run, "record", endless_from(0, ended))
        happened = list(train(run, StopAt(run, steps, reason)))
    assert happened[-1] == Stopped(reason, steps)
    assert ended.wait(10)
    assert Run.record is record
    if reason == "pause":
        snapshot = happened[-2]
        assert isinstance(snapshot, Snapshot)
        assert checkpoints(train(start({}, resume=snapshot.files))) == checkpoints(train(start({})))


def test_the_first_evaluation_ends_with_a_loop_that_nobody_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(Run, "record", endless_from(0, ended))
    happened = train(start({}))
    assert isinstance(next(happened), Steps)
    assert not ended.is_set()
    happened.close()  # type: ignore[attr-defined]


def test_a_snapshot_of_an_earlier_version_goes_on_with_the_routing_of_the_positions_that_are_read() -> None:
    """It knows neither a part of a text nor an evaluation that is due."""
    config = MOE | {"eval_max_tokens": 256}
    earlier = start(config | {"eval_max_tokens": None})
    assert earlier.text.is_whole
    *_, snapshot, _ = train(earlier, StopAt(earlier, 4))
    assert isinstance(snapshot, Snapshot)
    state = json.loads(snapshot.files[checkpoint.RESUME_STATE])
    del state["validation"], state["evaluation_is_due"]
    files = snapshot.files | {checkpoint.RESUME_STATE: checkpoint.to_json(state)}
    resumed = start(config, resume=files)
    positions = resumed.text.positions()
    assert len(positions) == resumed.text.n_targets < earlier.windows.n_targets_in_all
    for layer, chosen in resumed.progress.choices.items():
        assert torch.equal(chosen, earlier.progress.choices[layer][positions])
    expected = {p: files[checkpoint.WEIGHTS] for p, files in checkpoints(train(start(config))).items()}
    found = checkpoints(train(resumed))
    assert list(found) == [50, 75, 100]
    assert {p: files[checkpoint.WEIGHTS] for p, files in found.items()} == {p: expected[p] for p in found}


def test_the_routing_of_a_part_of_the_text_is_stored_with_its_positions() -> None:
    whole, part = (checkpoints(train(start(MOE | {"eval_max_tokens": n})))[100] for n in (None, 256))
    assert "positions" not in load_tensors(whole[checkpoint.ROUTING])
    stored = load_tensors(part[checkpoint.ROUTING])
    positions = start({"eval_max_tokens": 256}).text.positions()
    assert torch.equal(stored["positions"], positions)
    assert len(stored["layer.0"]) == len(positions)


def test_a_loss_that_is_not_finite_ends_training_at_its_step_and_yields_nothing_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nanomoe.training.loop.REPORT_SECONDS", 0.0)
    run = start({"epochs": 50})
    happened: list[Happened] = []

    def poisoned_after_step_5() -> None:
        for event in train(run):
            happened.append(event)
            if run.progress.step == 5 and isinstance(event, Steps):
                run.model.transformer.ln_f.weight.data.fill_(math.nan)

    with pytest.raises(LossNotFinite, match="at step 6 the loss is nan"):
        poisoned_after_step_5()
    figures = [loss for event in happened if isinstance(event, Steps) for loss in event.train_loss]
    assert len(figures) == 5
    assert all(map(math.isfinite, figures))


def test_a_cancelled_run_takes_no_snapshot() -> None:
    run = start({})
    happened = list(train(run, StopAt(run, 0, "cancel")))
    assert not any(isinstance(event, Snapshot) for event in happened)
    assert happened[-1] == Stopped("cancel", 0)


@pytest.fixture
def first_evaluation(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Percent 0 is evaluated once this is set, as if the text were very long."""
    may_end, record = threading.Event(), Run.record

    def wait_and_record(run: Run, percent: int, **options: Any) -> Any:
        assert percent > 0 or may_end.wait(10)
        return record(run, percent, **options)

    monkeypatch.setattr(Run, "record", wait_and_record)
    yield may_end
    may_end.set()


def test_a_cancel_does_not_wait_for_the_first_evaluation(first_evaluation: threading.Event) -> None:
    for steps in (0, 2):
        run = start({})
        happened = list(train(run, StopAt(run, steps, "cancel")))
        assert happened[-1] == Stopped("cancel", steps)
        assert checkpoints(happened) == {}
    assert not first_evaluation.is_set()


@pytest.mark.parametrize("config", [{}, MOE, BIAS])
@pytest.mark.parametrize("parent", [None, "another seed"])
def test_a_pause_leaves_its_snapshot_before_the_first_evaluation_ends_and_a_resume_records_it(
    config: dict[str, object], parent: str | None, first_evaluation: threading.Event
) -> None:
    config = config | {"epochs": 12}  # the first quarter, which does wait for it, is past these steps
    weights = start(config | {"seed": 7}).model.state_dict() if parent else None
    resume = None
    for steps in (2, 3):  # a second stop may come before the evaluation has ended as well
        run = start(config, resume=resume, parent=weights if resume is None else None)
        *_, snapshot, stopped = happened = list(train(run, StopAt(run, steps)))
        assert isinstance(snapshot, Snapshot)
        assert (snapshot.step, stopped, checkpoints(happened)) == (steps, Stopped("drain", steps), {})
        resume = snapshot.files
    first_evaluation.set()
    assert checkpoints(train(start(config, resume=resume))) == checkpoints(train(start(config, parent=weights)))


def test_what_the_training_steps_dropped_is_counted_from_one_checkpoint_to_the_next() -> None:
    happened = list(train(start(MOE)))
    recorded = {event.percent: event.metrics.moe for event in happened if isinstance(event, Recorded)}
    assert recorded[0].mean.train_dropped_fraction == 0
    assert 0 < recorded[50].mean.train_dropped_fraction < 1


def test_validation_text_is_never_trained_on_and_has_its_own_loss() -> None:
    run = start({"val_fraction": 0.3})
    assert run.val_windows is not None
    held_out = run.val_windows.tokens
    assert run.windows.tokens + held_out == load_tokenizer("bytes").encode(TEXT)
    losses = [event.metrics.val_loss for event in train(run) if isinstance(event, Recorded)]
    assert losses[0] == pytest.approx(math.log(256), abs=0.1)
    assert losses[-1] < losses[0]


class SmallMemory:
    """A forward pass that finds no memory for more than so many windows at once."""

    def __init__(self, run: Run, windows: int, from_step: int = 0) -> None:
        self.run, self.windows, self.from_step = run, windows, from_step
        self.forward = run.model.forward

    def __call__(self, tokens: torch.Tensor, **options: object) -> object:
        if self.run.model.training and len(tokens) > self.windows and self.run.progress.step >= self.from_step:
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        return self.forward(tokens, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [{}, {"use_moe": True, "n_experts": 4, "router_bias_update_rate": 1e-2}])
def test_a_micro_batch_that_does_not_fit_is_halved_and_the_result_differs_by_rounding(
    config: dict[str, object],
) -> None:
    whole = start({"batch_size": 8, "router_aux_loss_coef": 0.0} | config)
    expected = [event for event in train(whole) if isinstance(event, Recorded)]
    tight = start({"batch_size": 8, "router_aux_loss_coef": 0.0} | config)
    tight.model.forward = SmallMemory(tight, windows=3, from_step=2)  # type: ignore[method-assign,assignment]
    happened = list(train(tight))
    warned = [event.code for event in happened if isinstance(event, Warned)]
    found = [event for event in happened if isinstance(event, Recorded)]
    assert warned.count("micro_batch_halved") == warned.count("resume_not_exact") == 2
    assert tight.progress.micro_batch == 2
    for one, other in zip(found, expected, strict=True):
        assert one.metrics.loss == pytest.approx(other.metrics.loss, rel=1e-4)


def test_a_halved_micro_batch_stays_halved_after_a_resume() -> None:
    run = start({"batch_size": 8})
    run.model.forward = SmallMemory(run, windows=4)  # type: ignore[method-assign,assignment]
    run.train_step()
    assert start({"batch_size": 8}, resume=run.snapshot().files).progress.micro_batch == 4


@pytest.mark.parametrize(
    ("config", "said"),
    [({"batch_size": 1}, "not even one window of 32 tokens"), ({"batch_size": 8} | MOE, "capacity_factor")],
)
def test_a_micro_batch_that_cannot_be_halved_ends_the_job(config: dict[str, object], said: str) -> None:
    run = start(config)
    run.model.forward = SmallMemory(run, windows=0)  # type: ignore[method-assign,assignment]
    with pytest.raises(OutOfMemory, match=said):
        run.train_step()
