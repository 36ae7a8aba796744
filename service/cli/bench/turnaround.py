"""How soon jobs come one after the other through one worker: jobs of the reference shape, tiny ones, and the whole
reference job beside a plain script.

The trainer of a worker trains job after job. Times are measured from outside, as in `service.cli.bench.lifecycle`; what
they consist of is read from the times in the rows.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

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

_IDLE_SECONDS = 0.5
"""For which a worker is left without a job before one is submitted to it."""


@dataclass(frozen=True)
class Times:
    """Seconds that were measured repeatedly."""

    n: int
    median: float
    p90: float
    """The nine tenths of them that were shortest took at most so long."""

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Times":
        """The summary of at least one measurement."""
        return cls(len(seconds), statistics.median(seconds), sorted(seconds)[math.ceil(0.9 * len(seconds)) - 1])


@dataclass(frozen=True)
class Split:
    """What the time from one job's end to the next one's consists of, by the times in their rows."""

    end_to_claim: Times
    """From the end of the job before to the claim."""

    claim_to_last_checkpoint: Times
    """From the claim to the row of percent 100: the start message, the training, all evaluations and files."""

    last_checkpoint_to_end: Times
    """From the row of percent 100 to `succeeded`: the proof that nothing of the job is left."""


@dataclass(frozen=True)
class Turnaround:
    """Times of jobs that follow one another."""

    submit_to_first_step: Times
    """From the request sent to the first training step in the row, reference shape, on an idle worker."""

    end_to_next_first_step: Times
    """From one job's success to the next one's first step, both of the reference shape."""

    cancelled_to_next_first_step: Times
    """From a job's row that says `cancelled` to the first step of the next, both of the reference shape."""

    tiny_end_to_next_first_step: Times
    """From one tiny job's success to the next one's first step."""

    tiny_split: Split
    """What the life of a tiny job consists of."""

    tiny_per_minute: float
    """Tiny jobs that one worker ends in a minute while others are queued."""

    reference_steps: int
    """Optimizer steps of the whole reference job."""

    submit_to_succeeded: Times
    """From the request sent to the reference job's success in the row."""

    job_loss: float
    """Loss of the text at the end of the last reference job, nats per token."""

    script_seconds: Times | None
    """The same training as a plain script, from the shell; None where it was not measured."""

    times_as_fast_as_script: float | None
    """Seconds of the script over those of the job: the median of the turns' ratios."""

    script_loss: float | None
    """Loss of the text at the end of the last script."""


def measure(
    service: TemporaryService,
    *,
    n_jobs: int,
    n_tiny: int,
    most_seconds: float,
    steps: int | None = None,
    script: bool = True,
    said: Callable[[str], None] = lambda _: None,
) -> Turnaround:
    """Measure through the service's one worker, which is idle.

    `n_jobs`, `n_tiny`: most repetitions with the reference shape and with tiny jobs. After `most_seconds`, of which
    each part has its share, no further repetition begins; each part has at least one. `steps`: of the reference job, if
    not all of them. `said` is told what each part has measured, as soon as it has.
    """
    from nanomoe.bench.models import paragraph

    short, whole = JobConfig(max_steps=_SHORT_STEPS), JobConfig(max_steps=steps)
    with Client(service.url) as client:
        for config in (short, TINY):
            rows.wait(service, client.submit(paragraph(), config), rows.has_succeeded)
        said("the worker is warm")
        began = time.monotonic()

        def until(share: float) -> float:
            return began + share * most_seconds

        first_steps = Times.of(
            [_first_step_of_an_idle_worker(service, client, short) for _ in _turns(n_jobs, until(0.15))]
        )
        said(_line("submit to first step, idle worker", first_steps))
        between, _ = _one_after_another(service, client, short, n_jobs, until(0.35))
        said(_line("end to the next first step", between_times := Times.of(between)))
        after_cancel = Times.of([_after_a_cancel(service, client) for _ in _turns(n_jobs, until(0.5))])
        said(_line("cancelled to the next first step", after_cancel))
        tiny_between, tiny = _one_after_another(service, client, TINY, n_tiny, until(0.7))
        split, per_minute = _split(service, tiny)
        said(_line(f"end to the next first step, tiny jobs, {per_minute:.0f} a minute", Times.of(tiny_between)))
        scripts, ends, script_loss = [], [], None
        for _ in _turns(n_jobs, until(1)):
            if script:
                seconds, script_loss = _run_script(steps)
                scripts.append(seconds)
                said(f"plain script: {seconds:.2f} s")
            sent = time.monotonic()
            job = client.submit(paragraph(), whole)
            ends.append(rows.wait(service, job, rows.has_succeeded) - sent)
            said(f"reference job: {ends[-1]:.2f} s")
        loss = reads.list_checkpoints(service.database, job.id)[-1].metrics["loss"]
        n_steps = reads.get_job(service.database, job.id).progress["step"]
    return Turnaround(
        submit_to_first_step=first_steps,
        end_to_next_first_step=between_times,
        cancelled_to_next_first_step=after_cancel,
        tiny_end_to_next_first_step=Times.of(tiny_between),
        tiny_split=split,
        tiny_per_minute=per_minute,
        reference_steps=n_steps,
        submit_to_succeeded=Times.of(ends),
        job_loss=loss,
        script_seconds=Times.of(scripts) if scripts else None,
        times_as_fast_as_script=statistics.median(s / j for s, j in zip(scripts, ends, strict=True))
        if scripts
        else None,
        script_loss=script_loss,
    )


def _turns(most: int, until: float) -> Iterator[int]:
    """Count the repetitions: one, and more until there are `most` or the monotonic time is `until`."""
    for turn in range(most):
        if turn == 0 or time.monotonic() < until:
            yield turn


def _line(what: str, times: Times) -> str:
    return f"{what}: {1e3 * times.median:,.0f} ms, 90 % within {1e3 * times.p90:,.0f} ms, {times.n} times"


def _first_step_of_an_idle_worker(service: TemporaryService, client: Client, config: JobConfig) -> float:
    from nanomoe.bench.models import paragraph

    time.sleep(_IDLE_SECONDS)
    sent = time.monotonic()
    job = client.submit(paragraph(), config)
    seconds = rows.wait(service, job, rows.has_trained) - sent
    rows.wait(service, job, rows.has_succeeded)
    return seconds


def _one_after_another(
    service: TemporaryService, client: Client, config: JobConfig, n: int, until: float
) -> tuple[list[float], list[JobHandle]]:
    """Seconds from each job's success to the next one's first step, and the jobs that succeeded one after another; the
    rest of n + 1 queued jobs is cancelled at `until`."""
    from nanomoe.bench.models import paragraph

    jobs = [client.submit(paragraph(), config) for _ in range(n + 1)]
    ended = rows.wait(service, jobs[0], rows.has_succeeded)
    between: list[float] = []
    for job in jobs[1:]:
        if between and time.monotonic() > until:
            break
        between.append(rows.wait(service, job, rows.has_trained) - ended)
        ended = rows.wait(service, job, rows.has_succeeded)
    done, left = jobs[: len(between) + 1], jobs[len(between) + 1 :]
    for job in reversed(left):
        rows.end(service, job)
    return between, done


def _split(service: TemporaryService, jobs: Sequence[JobHandle]) -> tuple[Split, float]:
    """What the lives of jobs consist of that succeeded one after another, and how many a minute ended."""
    found = [reads.get_job(service.database, job.id) for job in jobs]
    parts: list[tuple[float, float, float]] = []
    for before, job in pairwise(found):
        last = reads.list_checkpoints(service.database, job.id)[-1].created_at
        assert before.finished_at is not None
        assert job.started_at is not None
        assert job.finished_at is not None
        moments = pairwise((before.finished_at, job.started_at, last, job.finished_at))
        first, second, third = ((later - earlier).total_seconds() for earlier, later in moments)
        parts.append((first, second, third))
    seconds = sum(map(sum, parts))
    return Split(*(Times.of(part) for part in zip(*parts, strict=True))), 60 * len(parts) / seconds


def _after_a_cancel(service: TemporaryService, client: Client) -> float:
    from nanomoe.bench.models import paragraph

    cancelled, behind = [client.submit(paragraph(), JobConfig(epochs=_LONG)) for _ in range(2)]
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
