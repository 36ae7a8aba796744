"""The update in three launches against torch's norm, clipping and AdamW."""

import math

import pytest
import torch
from torch import Tensor, nn

from nanomoe.config import JobConfig
from nanomoe.training.optim import AdamW

pytestmark = pytest.mark.triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def toy() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(37, 31), nn.Linear(31, 5)).to(DEVICE)


def scalars(*numbers: float) -> list[Tensor]:
    return [torch.tensor(number, device=DEVICE) for number in numbers]


@pytest.mark.parametrize("config", [{}, {"grad_clip": 0.5, "betas": (0.0, 0.9)}])
def test_weights_and_moments_are_those_of_torch(config: dict[str, object]) -> None:
    from nanomoe.training.steps.kernels.update import FlatAdamW

    parsed = JobConfig.model_validate({"weight_decay": 0.1} | config)
    ours, theirs = toy(), toy()
    flat, plain = FlatAdamW(ours, parsed), AdamW(theirs, parsed)
    for step in range(3):
        for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
            reference.grad = torch.randn_like(reference) * 10**step
            assert mine.grad is not None
            mine.grad.copy_(reference.grad)
        loss, lr, norm, skipped = scalars(1.0, 1e-2 / (step + 1), 0.0, 0.0)
        flat.update(loss, lr, norm, skipped)
        total = torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters() if p.grad is not None])
        if parsed.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(theirs.parameters(), parsed.grad_clip, total)
        plain.lr = lr
        plain.step()
        torch.testing.assert_close(norm, total, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(flat.tensors(), plain.tensors(), rtol=1e-5, atol=1e-7)
    again = FlatAdamW(toy(), parsed)
    again.load(plain.tensors())
    assert all(torch.equal(tensor, plain.tensors()[name]) for name, tensor in again.tensors().items())


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 1.0), (1.0, math.inf), (1.0, 1e30)])
def test_nothing_changes_from_a_step_on_that_is_not_finite(loss: float, gradient: float) -> None:
    from nanomoe.training.steps.kernels.update import FlatAdamW

    model = toy()
    flat = FlatAdamW(model, JobConfig())
    skipped = torch.zeros((), device=DEVICE)
    for number, (of_step, of_gradient) in enumerate([(1.0, 1.0), (loss, gradient), (1.0, 1.0)]):
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.fill_(of_gradient)
        before = {name: tensor.clone() for name, tensor in (model.state_dict() | flat.tensors()).items()}
        flat.update(*scalars(of_step, 1e-2, 0.0), skipped)
        after = model.state_dict() | flat.tensors()
        has_changed = [name for name in after if not torch.equal(after[name], before[name])]
        assert (has_changed != []) == (number == 0)
        assert skipped.item() == (number > 0)
