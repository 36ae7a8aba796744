"""How soon jobs come one after the other through one worker: the reference job, and tiny ones.

The trainer of a worker trains job after job. Times are measured from outside, as in `service.cli.bench.lifecycle`.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

from nanomoe.config import JobConfig
from service.cli.bench import rows
from service.cli.bench.temporary_service import TemporaryService
from service.client import Client, JobHandle
from service.jobs import reads

TINY = JobConfig(tokenizer="bytes", n_layer=1, n_embd=32, epochs=4)
"""4 steps on bytes, 1 layer, 32 channels."""

_SHORT_STEPS = 20
"""Steps of a job of the reference shape between whose end and the next one's first step the time is measured."""

_LONG = 100_000
"""Epochs of a job that is still training when it is cancelled."""


@dataclass(frozen=True)
class Turnaround:
    """Times of jobs that follow one another; each pair is the median and the maximum."""

    n_jobs: int
    """Reference jobs and pairs of jobs that were measured."""

    reference_steps: int
    """Optimizer steps of the reference job."""

    submit_to_first_step: tuple[float, float]
    """Seconds from the request sent to the reference job's first training step in the row, on an idle worker."""

    submit_to_succeeded: tuple[float, float]
    """Seconds from the request sent to the reference job's success in the row."""

    script_seconds: tuple[float, float] | None
    """Seconds of the same training as a plain script, from the shell; None where it was not measured."""

    times_as_fast_as_script: float | None
    """Seconds of the script over those of the job: the median of the turns' ratios."""

    job_loss: float
    """Loss of the text at the end of the last reference job, nats per token."""

    script_loss: float | None
    """Loss of the text at the end of the last script."""

    end_to_next_first_step: tuple[float, float]
    """Seconds from one job's success to the next one's first step, both of the reference shape."""

    tiny_end_to_next_first_step: tuple[float, float]
    """The same between tiny jobs."""

    cancelled_to_next_first_step: tuple[float, float]
    """Seconds from a job's row that says `cancelled` to the first step of the next, both of the reference shape."""

    n_tiny: int
    """Tiny jobs that were counted."""

    tiny_per_minute: float
    """Tiny jobs that one worker ends in a minute while others are queued."""


def measure(
    service: TemporaryService, *, n_jobs: int, n_tiny: int, settle: float, steps: int | None = None, script: bool = True
) -> Turnaround:
    """Measure through the service's one worker, which is idle. `settle`: seconds after which it is assumed to be warm.
    `steps`: of the reference job, if not all of them."""
    from nanomoe.bench.models import paragraph

    with Client(service.url) as client:
        reference = JobConfig(max_steps=steps)
        short = JobConfig(max_steps=_SHORT_STEPS)
        rows.wait(service, client.submit(paragraph(), short), rows.has_succeeded)
        first_steps, ends, scripts, losses = [], [], [], []
        job_loss = 0.0
        for _ in range(n_jobs):
            if script:
                seconds, loss = _run_script(steps)
                scripts.append(seconds)
                losses.append(loss)
            time.sleep(settle)
            began = time.monotonic()
            job = client.submit(paragraph(), reference)
            first_steps.append(rows.wait(service, job, rows.has_trained) - began)
            ends.append(rows.wait(service, job, rows.has_succeeded) - began)
            job_loss = reads.list_checkpoints(service.database, job.id)[-1].metrics["loss"]
        between, _ = _one_after_another(service, _submit(client, short, n_jobs + 1))
        tiny_between, tiny_ends = _one_after_another(service, _submit(client, TINY, n_tiny + 1))
        after_cancel = [_after_a_cancel(service, client) for _ in range(n_jobs)]
        n_steps = reads.get_job(service.database, job.id).progress["step"]
    return Turnaround(
        n_jobs=n_jobs,
        reference_steps=n_steps,
        submit_to_first_step=_median_and_max(first_steps),
        submit_to_succeeded=_median_and_max(ends),
        script_seconds=_median_and_max(scripts) if scripts else None,
        times_as_fast_as_script=statistics.median(s / j for s, j in zip(scripts, ends, strict=True))
        if script
        else None,
        job_loss=job_loss,
        script_loss=losses[-1] if losses else None,
        end_to_next_first_step=_median_and_max(between),
        tiny_end_to_next_first_step=_median_and_max(tiny_between),
        cancelled_to_next_first_step=_median_and_max(after_cancel),
        n_tiny=n_tiny,
        tiny_per_minute=60 * n_tiny / (tiny_ends[-1] - tiny_ends[0]),
    )


def _submit(client: Client, config: JobConfig, n: int) -> list[JobHandle]:
    from nanomoe.bench.models import paragraph

    return [client.submit(paragraph(), config) for _ in range(n)]


def _one_after_another(service: TemporaryService, jobs: list[JobHandle]) -> tuple[list[float], list[float]]:
    """Seconds from each job's success to the next one's first step, and the monotonic times of the successes."""
    ends = [rows.wait(service, jobs[0], rows.has_succeeded)]
    between = []
    for job in jobs[1:]:
        between.append(rows.wait(service, job, rows.has_trained) - ends[-1])
        ends.append(rows.wait(service, job, rows.has_succeeded))
    return between, ends


def _after_a_cancel(service: TemporaryService, client: Client) -> float:
    cancelled, behind = _submit(client, JobConfig(epochs=_LONG), 2)
    rows.wait(service, cancelled, rows.has_trained)
    ended = rows.cancel(service, cancelled)
    seconds = rows.wait(service, behind, rows.has_trained) - ended
    rows.cancel(service, behind)
    return seconds


def _run_script(steps: int | None) -> tuple[float, float]:
    """Seconds of the plain script's process, and the loss that it ends with."""
    command = [sys.executable, "-m", "nanomoe.bench.plain_script", *([] if steps is None else ["--steps", str(steps)])]
    began = time.monotonic()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
    return time.monotonic() - began, float(json.loads(done.stdout)["loss"])


def _median_ratio(numerators: list[float], denominators: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(numerators, denominators, strict=True))


def _median_and_max(seconds: list[float]) -> tuple[float, float]:
    return statistics.median(seconds), max(seconds)
