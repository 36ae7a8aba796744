"""Small runs whose steps are done in either way."""

from typing import Any

import torch

from nanomoe.config import JobConfig
from nanomoe.tokenizer import load_tokenizer
from nanomoe.training.execution import Execution
from nanomoe.training.loop import Happened, StopReason, Undisturbed
from nanomoe.training.run import Recorded, Run
from nanomoe.training.steps.choice import StepPath

TEXT = "o rato roeu a roupa do rei de roma, e a rainha com raiva resolveu remendar. " * 4
TINY = {"tokenizer": "bytes", "block_size": 33, "n_layer": 2, "n_head": 2, "n_embd": 32, "batch_size": 4}


def start(config: dict[str, Any], path: StepPath = "fused", resume: dict[str, bytes] | None = None) -> Run:
    parsed = JobConfig.model_validate(TINY | config)
    tokenizer = load_tokenizer("bytes")
    execution = Execution.decide(parsed, "cpu", n_tokens=len(TEXT), path=path)
    assert execution.path == path
    return Run(parsed, tokenizer.encode(TEXT), tokenizer, execution, device=torch.device("cpu"), resume=resume)


def curve(run: Run, n_steps: int) -> torch.Tensor:
    return torch.stack([run.train_step()[0] for _ in range(n_steps)]).double()


def checkpoints(happened: list[Happened]) -> dict[int, dict[str, bytes]]:
    return {event.percent: event.files for event in happened if isinstance(event, Recorded)}


class StopAt(Undisturbed):
    """Asks for a stop once a step is done."""

    def __init__(self, run: Run, step: int) -> None:
        self.run, self.step = run, step

    def stop(self) -> StopReason | None:
        return "drain" if self.run.progress.step >= self.step else None
