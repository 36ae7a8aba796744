"""Which share of a job is not training: evaluations and the files of checkpoints, by the length of the text.

A job runs to its end in this process, and beside it, in alternating turns, as many steps of the same config alone.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanomoe.bench import machine
from nanomoe.bench.training.shapes import text_of
from nanomoe.config import JobConfig
from nanomoe.tokenizer import load_tokenizer
from nanomoe.training.loop import train
from nanomoe.training.run import Run, prepare

_CONFIG = JobConfig(tokenizer="bytes", block_size=64)


@dataclass(frozen=True)
class EvaluationShare:
    """What was measured with one length of the text."""

    n_tokens: int
    """Tokens of the text."""

    n_steps: int
    """Optimizer steps of the job."""

    n_trained_tokens: int
    """Targets that these steps train on, repetitions counted."""

    steps_seconds: float
    """Seconds of the steps alone: the median."""

    job_seconds: float
    """Seconds of the whole job: the median."""

    share: float
    """Share of the job's time that the steps alone do not take: the median of the turns' shares."""


def measure(
    n_tokens: int, n_steps: int, device: torch.device, *, turns: int, said: Callable[[str], None] = lambda _: None
) -> EvaluationShare:
    """Measure jobs of `n_steps` steps of 12 windows of 64 tokens on a text of `n_tokens` bytes."""
    config = _CONFIG.model_copy(update={"max_steps": n_steps, "epochs": max(_CONFIG.epochs, n_steps)})
    tokenizer = load_tokenizer(config.tokenizer)
    text = text_of(tokenizer, n_tokens)

    def new_run() -> Run:
        return prepare(config, text, tokenizer, device=str(device)).run

    warm = new_run()
    n_trained = sum(warm.windows.n_targets(warm.order.step(index).windows) for index in range(n_steps))
    warm.train_step()
    n_threads = torch.get_num_threads()
    turns_seconds = []
    for turn in range(turns):
        said(f"{n_tokens:,} tokens, turn {turn + 1} of {turns}: steps")
        steps_seconds = _seconds(new_run(), _steps_alone, device)
        said(f"{n_tokens:,} tokens, turn {turn + 1} of {turns}: job")
        turns_seconds.append((steps_seconds, _seconds(new_run(), _whole_job, device)))
    torch.set_num_threads(n_threads)
    steps, jobs = zip(*turns_seconds, strict=True)
    return EvaluationShare(
        n_tokens=n_tokens,
        n_steps=n_steps,
        n_trained_tokens=n_trained,
        steps_seconds=statistics.median(steps),
        job_seconds=statistics.median(jobs),
        share=statistics.median(1 - alone / whole for alone, whole in turns_seconds),
    )


def _seconds(run: Run, work: Callable[[Run], None], device: torch.device) -> float:
    machine.synchronize(device)
    began = time.perf_counter()
    work(run)
    machine.synchronize(device)
    return time.perf_counter() - began


def _steps_alone(run: Run) -> None:
    for _ in range(run.plan.total_steps):
        run.train_step()


def _whole_job(run: Run) -> None:
    for _ in train(run):
        pass
    assert run.progress.step == run.plan.total_steps, "the job did all of its steps"
