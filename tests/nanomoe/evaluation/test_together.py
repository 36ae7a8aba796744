"""Several models that are evaluated in the same passes, against each of them alone."""

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch

from nanomoe.config import JobConfig
from nanomoe.data import Windows
from nanomoe.evaluation import evaluate, together
from nanomoe.evaluation.evaluate import Measured, measure
from nanomoe.evaluation.evaluated_text import EvaluatedText
from nanomoe.evaluation.reader import BATCH_BYTES, LOGITS_BYTES, PlainReader, Reading
from nanomoe.evaluation.together import Evaluated, measure_together, models_at_once
from nanomoe.generation.continuation import choose_rows
from nanomoe.model.gpt import GPT

TEXT = list(b"o rato roeu a roupa do rei de roma, e a rainha com raiva resolveu remendar. " * 4)
TINY = {"tokenizer": "bytes", "block_size": 40, "n_layer": 2, "n_head": 2, "n_embd": 16, "cont_max_new_tokens": 12}
MOE = {"use_moe": True, "n_experts": 4, "moe_stride": 1, "n_shared_experts": 1, "capacity_factor": 1.0}
OWN: list[dict[str, Any]] = [
    {},
    {"seed": 7, "temperature": 1.0, "top_k": 5},
    {"seed": 8, "temperature": 0.7, "top_k": None},
]
"""What members of a cohort differ in, as far as an evaluation sees it."""


def evaluated(
    config: dict[str, Any], tokens: list[int] = TEXT, max_targets: int = 10_000, device: str = "cpu"
) -> Evaluated:
    parsed = JobConfig.model_validate(TINY | config)
    model = GPT.build(parsed, 256)
    model.init_weights(parsed.seed)
    generator = torch.Generator().manual_seed(parsed.seed)
    for tensor in (*model.parameters(), *model.buffers()):  # decided, with biases that are not 0
        tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)
    model.to(device)
    n_val = int(len(tokens) * parsed.val_fraction)
    parts = (tokens[n_val:], tokens[: n_val or None])
    text, val = (Windows(torch.tensor(part, device=device), parsed.block_size) for part in parts)
    val_text = EvaluatedText(val, max_targets) if n_val else None
    return Evaluated(model, EvaluatedText(text, max_targets), val_text, parsed)


def alone(one: Evaluated) -> Measured:
    return measure(one.model, one.text, one.val_text, one.config, PlainReader(one.model))


def assert_close(mine: Measured, theirs: Measured) -> None:
    def readings(one: Measured) -> list[Reading]:
        return [one.read] if one.beginning is None else [one.read, one.beginning]

    assert len(readings(mine)) == len(readings(theirs))
    for ours, reference in zip(readings(mine), readings(theirs), strict=True):
        assert (ours.windows, ours.n_targets, ours.predicted) == (
            reference.windows,
            reference.n_targets,
            reference.predicted,
        )
        torch.testing.assert_close(ours.losses, reference.losses, rtol=2e-5, atol=2e-6)
        assert ours.total == pytest.approx(reference.total, rel=1e-6)
        for layer, routing in reference.routing.items():
            torch.testing.assert_close(
                asdict(ours.routing[layer]), asdict(routing), rtol=1e-5, atol=1e-6, check_device=False
            )
    assert mine.added == theirs.added
    assert mine.val_loss == (None if theirs.val_loss is None else pytest.approx(theirs.val_loss, rel=1e-6))
    assert mine.router_grad_norms == pytest.approx(theirs.router_grad_norms, rel=1e-4)
    assert (mine.losses_without is None) == (theirs.losses_without is None)
    for layer, losses in (theirs.losses_without or {}).items():
        assert mine.losses_without is not None
        assert mine.losses_without[layer] == pytest.approx(losses, rel=1e-6)


SHAPES: dict[str, dict[str, Any]] = {
    "dense": {},
    "no bias": {"bias": False, "val_fraction": 0.3},
    "a text shorter than a window": {"block_size": 400},
    "nothing is added": {"cont_max_new_tokens": 0},
    "slides beyond the window": {"cont_max_new_tokens": 35},
    "mixture": MOE | {"val_fraction": 0.2},
    "balanced, noisy mixture": MOE | {"router_bias_update_rate": 1e-2, "router_noise": True, "router_score": "sigmoid"},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_is_measured_in_company_is_what_is_measured_alone(shape: dict[str, Any]) -> None:
    members = [evaluated(shape | own) for own in OWN]
    assert len({one.shape for one in members}) == 1
    theirs = [alone(one) for one in members]
    for mine, reference in zip(measure_together(members, 4), theirs, strict=True):
        assert_close(mine, reference)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [{}, MOE | {"val_fraction": 0.2}], ids=["dense", "mixture"])
def test_on_a_gpu_too_and_no_bit_depends_on_the_company(shape: dict[str, Any]) -> None:
    members = [evaluated(shape | own, device="cuda") for own in OWN]
    theirs = [alone(one) for one in members]
    together = measure_together(members, 4)
    for mine, reference in zip(together, theirs, strict=True):
        assert_close(mine, reference)
    (only,) = measure_together([evaluated(shape | OWN[2], device="cuda")], 4)
    torch.testing.assert_close(asdict(only), asdict(together[2]), rtol=0, atol=0)


def test_some_windows_of_texts_of_their_own_and_the_beginning_that_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "MAX_RECONSTRUCTED", 90)
    monkeypatch.setitem(BATCH_BYTES, "cpu", 110_000)  # two windows
    monkeypatch.setitem(LOGITS_BYTES, "cpu", 3 * 50 * 1024)
    texts = (TEXT, TEXT[7:], TEXT[:-5])
    members = [
        evaluated(MOE | own, tokens[: len(TEXT) - 7 + n], 130)
        for n, (own, tokens) in enumerate(zip(OWN, texts, strict=True))
    ]
    assert len({one.shape for one in members}) == 1
    assert PlainReader(members[0].model).windows_per_batch(members[0].text.all_windows) == 2
    theirs = [alone(one) for one in members]
    assert all(each.beginning is not None for each in theirs)
    for mine, reference in zip(measure_together(members, 3), theirs, strict=True):
        assert_close(mine, reference)


@pytest.mark.parametrize("shape", [{}, MOE], ids=["dense", "mixture"])
def test_no_bit_of_a_member_depends_on_its_company_or_on_its_place(shape: dict[str, Any]) -> None:
    def measured(places: list[int]) -> dict[int, dict[str, Any]]:
        found = measure_together([evaluated(shape | OWN[place]) for place in places], 3)
        return dict(zip(places, map(asdict, found), strict=True))

    together, others = measured([0, 1, 2]), measured([2, 0])
    only = measured([1])
    for place, own in (others | only).items():
        torch.testing.assert_close(own, together[place], rtol=0, atol=0)


@pytest.mark.parametrize(
    "other",
    [
        {"cont_prefix_tokens": 3},
        {"cont_max_new_tokens": 3},
        {"val_fraction": 0.5},
        {"block_size": 20},
    ],
    ids=str,
)
def test_what_cannot_be_passed_together_has_another_shape(other: dict[str, Any]) -> None:
    assert evaluated(other).shape != evaluated({}).shape
    assert evaluated({}, TEXT[:100]).shape != evaluated({}).shape
    assert evaluated({}, max_targets=50).shape != evaluated({}).shape


def test_as_many_models_at_once_as_hold_their_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = evaluated({}, TEXT[:40]), evaluated({})
    assert models_at_once(short, 8) == models_at_once(long, 8) == 8
    monkeypatch.setitem(BATCH_BYTES, "cpu", 4 * 40 * 4 * (8 * 16 + 64))  # four windows
    assert models_at_once(short, 8) == 4
    assert models_at_once(short, 3) == 3
    assert models_at_once(long, 8) == 1


def test_a_stop_ends_it_between_two_passes() -> None:
    n_asked = 0

    def stop() -> None:
        nonlocal n_asked
        n_asked += 1
        if n_asked == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        measure_together([evaluated(MOE | own) for own in OWN], 3, stop)
    assert n_asked == 3


def test_a_logit_that_overflows_is_an_error() -> None:
    members = [evaluated(own) for own in OWN]
    members[1].model.transformer.ln_f.weight.data.fill_(math.inf)
    with pytest.raises(ValueError, match="overflow"):
        measure_together(members, 3)


def test_a_pass_drafts_for_all_members(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def counting(logits_RV: torch.Tensor, *others: Any) -> list[int]:
        rows.append(len(logits_RV))
        return choose_rows(logits_RV, *others)

    monkeypatch.setattr(together, "choose_rows", counting)
    measure_together([evaluated(own) for own in OWN], 3)
    assert 1 <= len(rows) <= 12
    assert set(rows) == {3 * 2 * 12}
