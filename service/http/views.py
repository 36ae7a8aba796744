"""Converts rows to the responses of the HTTP contract. Knows no query and no route."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

from nanomoe.checkpoint import stopped_early_at
from nanomoe.config import ConfigWarning, JobConfig
from nanomoe.config_warnings import unused_moe_settings
from nanomoe.evaluation.metrics import perplexity
from service.generation.admission import EngineResult, Summary
from service.generation.messages import Chunk, Inspected, LogProbsWithBytes, Scored
from service.http import schemas
from service.jobs import sweeps
from service.jobs.addressing import Address
from service.jobs.compared_jobs import ComparedJob
from service.jobs.comparison import LARGER_IS_BETTER, Comparison, Group, Spread
from service.jobs.envelope import LossEnvelope
from service.jobs.numbered_events import JobProgress, NumberedEvent
from service.jobs.pace import Pace, Planned, predict
from service.jobs.reads import NewestFigures
from service.jobs.statuses import Status
from service.jobs.submission import Assessment
from service.jobs.tables import LARGE_METRICS, Checkpoint, Job, Sweep, Worker
from service.presets import Preset


def _config(stored: dict[str, Any]) -> JobConfig:
    # JSON has no tuples and no instances: the strictness for requests would refuse what was stored.
    return JobConfig.model_validate(stored, strict=False)


def job(
    row: Job,
    *,
    queue_position: int | None = None,
    estimated_start_at: datetime | None = None,
    waiting_reason: str | None = None,
) -> schemas.JobView:
    """A job as `GET /jobs/{id}` answers it. `waiting_reason`: why it waits, where its row has no reason of its own."""
    config = _config(row.config)
    return schemas.JobView(
        id=row.id,
        name=row.name,
        tags=row.tags,
        status=row.status,
        queue_position=queue_position,
        estimated_start_at=estimated_start_at,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        attempt=row.attempt,
        status_reason=row.status_reason or waiting_reason or _stopped_early_reason(row),
        priority=row.priority,
        run_at=row.run_at,
        execution=row.execution,
        cohort=_cohort(row),
        progress=progress(row),
        config=config,
        model=schemas.ModelSize.model_validate(row, from_attributes=True),
        text=schemas.TextInfo(sha256=row.text_sha256, n_bytes=row.text_n_bytes, n_tokens=row.n_tokens),
        warnings=_warnings(row, config),
        error=None if row.error is None else schemas.JobError.model_validate(row.error),
        parent=_parent(row),
        sweep_id=row.sweep_id,
    )


def _warnings(row: Job, config: JobConfig) -> list[ConfigWarning]:
    """The row's warnings, with `moe_settings_unused` computed anew: rows of earlier versions name every setting of a
    mixture in it, for each dense job."""
    warnings = [ConfigWarning.model_validate(warning) for warning in row.warnings]
    unused = {warning.code: warning for warning in unused_moe_settings(config)}
    return [unused.get(w.code, w) for w in warnings if w.code != "moe_settings_unused" or unused]


def progress(row: Job) -> schemas.Progress:
    """Progress of a job: 100 % for one that has succeeded, even if it stopped early."""
    done = {"percent": 100.0, "eta_seconds": 0.0} if row.status == "succeeded" else {}
    return schemas.Progress.model_validate({"total_steps": row.total_steps} | row.progress | done)


def _stopped_early_reason(row: Job) -> str | None:
    """Why a job stopped early, for rows of earlier versions, which have no reason; None for any other job."""
    step, total_steps = row.progress.get("step"), row.total_steps
    if row.status != "succeeded" or step is None or total_steps is None or step >= total_steps:
        return None
    return stopped_early_at(step)


def job_page(
    rows: Sequence[tuple[Job, NewestFigures | None]],
    limit: int,
    counts: Mapping[Status, int] | None = None,
    waiting_reasons: Mapping[str, str] = MappingProxyType({}),
) -> schemas.JobPage:
    """A page of at most `limit` jobs, made from one more than that if there are more. `waiting_reasons`: by a job's id,
    why it waits."""
    shown = rows[:limit]
    return schemas.JobPage(
        data=[with_figures(job(row, waiting_reason=waiting_reasons.get(row.id)), figures) for row, figures in shown],
        next_cursor=str(shown[-1][0].seq) if len(rows) > limit else None,
        counts=None if counts is None else dict(counts),
    )


def with_figures(view: schemas.JobView, figures: NewestFigures | None) -> schemas.JobView:
    """The job with the figures of its newest checkpoint."""
    return view.model_copy(update={"figures": None if figures is None else schemas.JobFigures(**figures._asdict())})


def _cohort(row: Job) -> schemas.Cohort | None:
    if row.cohort_id is None or row.cohort_size is None:
        return None
    return schemas.Cohort(id=row.cohort_id, size=row.cohort_size)


def _parent(row: Job) -> schemas.Parent | None:
    if row.parent_id is None or row.parent_percent is None:
        return None
    return schemas.Parent(job_id=row.parent_id, checkpoint=row.parent_percent)


def estimate(found: Assessment, pace: Pace) -> schemas.Estimate:
    """What a dry run answers."""
    plan, sizes = found.plan, found.sizes
    return schemas.Estimate(
        config=found.config,
        text=schemas.TextInfo(sha256=found.text_sha256, n_bytes=found.n_bytes, n_tokens=found.n_tokens),
        model=schemas.ModelSize.model_validate(sizes, from_attributes=True),
        training_bytes=sizes.training_bytes,
        flops_per_token=sizes.flops_per_token,
        steps_per_epoch=None if plan is None else plan.steps_per_epoch,
        total_steps=None if plan is None else plan.total_steps,
        quarters={} if plan is None else {percent: step for step, percent in plan.quarters.items()},
        predicted_seconds=predict([_planned(found)], pace).seconds,
        warnings=found.warnings,
    )


def sweep(row: Sweep, counts: Mapping[Status, int], progress: sweeps.SweepProgress | None = None) -> schemas.SweepView:
    """A sweep as `GET /sweeps/{id}` answers it; without `progress` as in lists."""
    together = None if progress is None else schemas.SweepProgress.model_validate(progress, from_attributes=True)
    return schemas.SweepView(
        id=row.id,
        name=row.name,
        tags=row.tags,
        status=sweeps.status_of(counts),
        counts=dict(counts),
        created_at=row.created_at,
        config=row.config,
        parameters=[schemas.SweepParameter.model_validate(parameter) for parameter in row.parameters],
        job_ids=None if progress is None else progress.job_ids,
        progress=together,
        eta_seconds=None if progress is None else progress.eta_seconds,
    )


def sweep_page(rows: Sequence[tuple[Sweep, Mapping[Status, int]]], limit: int) -> schemas.Page[schemas.SweepView]:
    """A page of at most `limit` sweeps, made from one more than that if there are more."""
    shown = rows[:limit]
    return schemas.Page(
        data=[sweep(row, counts) for row, counts in shown],
        next_cursor=str(shown[-1][0].seq) if len(rows) > limit else None,
    )


def sweep_estimate(
    jobs: Sequence[Assessment], parameters: Sequence[Mapping[str, Any]], pace: Pace
) -> schemas.SweepEstimate:
    """What a dry run of a sweep answers. `jobs`: one for each job."""
    steps = [None if one.plan is None else one.plan.total_steps for one in jobs]
    predicted = predict([_planned(one) for one in jobs], pace)
    together = predicted.together
    warnings = Counter(warning for one in jobs for warning in one.warnings)
    total_steps = [n for n in steps if n is not None]
    return schemas.SweepEstimate(
        n_jobs=len(jobs),
        parameters=[schemas.SweepParameter.model_validate(parameter) for parameter in parameters],
        shapes=_shapes(jobs, together),
        training_bytes=max((one.sizes.training_bytes for one in jobs if one.sizes.training_bytes), default=None),
        total_steps=sum(total_steps) if len(total_steps) == len(steps) else None,
        cohorts=None if None in together else _cohort_sizes([n for n in together if n is not None]),
        predicted_seconds=predicted.seconds,
        predicted_alone_seconds=predicted.seconds_alone,
        warnings=[
            schemas.SweepWarning(code=warning.code, message=warning.message, n_jobs=n)
            for warning, n in warnings.items()
        ],
    )


def _shapes(jobs: Sequence[Assessment], together: Sequence[int | None]) -> list[schemas.SweepShape]:
    """The jobs of a sweep by their sizes and by with which others they may be trained."""
    found: dict[Any, list[int]] = {}
    for n, one in enumerate(jobs):
        of_job = one.sizes.n_params, one.sizes.n_active_params, one.sizes.training_bytes
        found.setdefault((*of_job, one.plan and one.plan.total_steps, one.cohort_key), []).append(n)
    return [
        schemas.SweepShape(
            n_jobs=len(those),
            n_params=n_params,
            n_active_params=n_active_params,
            training_bytes=training_bytes,
            total_steps=total_steps,
            together=max((size for n in those if (size := together[n]) is not None), default=None),
        )
        for (n_params, n_active_params, training_bytes, total_steps, _), those in found.items()
    ]


def _cohort_sizes(together: Sequence[int]) -> list[schemas.SweepCohorts]:
    """How many cohorts there are of each size, the largest first. `together`: for each job how many it is among."""
    counts = sorted(Counter(together).items(), reverse=True)
    return [schemas.SweepCohorts(n_jobs=size, n_cohorts=n // size) for size, n in counts]


_EVENTS: dict[str, type[BaseModel]] = {
    "status": schemas.JobStatusEvent,
    "checkpoint": schemas.JobCheckpointEvent,
    "warning": schemas.JobWarningEvent,
}


def numbered_event(event: NumberedEvent) -> BaseModel:
    """The data of an event in a stream of many jobs."""
    return _EVENTS[event.kind].model_validate(event.data | {"job_id": event.job_id})


def job_step(found: JobProgress) -> schemas.JobStepEvent:
    """The progress of a running job in a stream of many jobs."""
    return schemas.JobStepEvent.model_validate(
        {"total_steps": found.total_steps} | found.progress | {"job_id": found.job_id}
    )


def _planned(job: Assessment) -> Planned:
    return Planned(
        cohort_key=job.cohort_key,
        training_bytes=job.sizes.least_training_bytes,
        total_steps=None if job.plan is None else job.plan.total_steps,
        n_active_params=job.sizes.n_active_params,
    )


def comparison(found: Comparison, metrics: Sequence[str]) -> schemas.Comparison:
    """The answer to `GET /compare`. Validated once, as a whole: it may hold tens of thousands of figures."""
    return schemas.Comparison.model_validate(
        {
            "parameters": [{"name": name, "values": values} for name, values in found.parameters.items()],
            "metrics": metrics,
            "larger_is_better": [name for name in metrics if name in LARGER_IS_BETTER],
            "jobs": [_compared_job(found, one) for one in found.jobs],
            "groups": [_compared_group(group) for group in found.groups],
            "best": None if found.best is None else vars(found.best),
        }
    )


def _compared_job(found: Comparison, job: ComparedJob) -> dict[str, Any]:
    until = found.until.get(job.id)
    return {
        "job_id": job.id,
        "name": job.name,
        "status": job.status,
        "values": found.values_of(job),
        "quarters": [{"percent": one.percent, "step": one.step, "metrics": one.figures} for one in job.quarters],
        "steps_until": None if until is None else vars(until),
        "at_step": job.at_step,
    }


def _compared_group(group: Group) -> dict[str, Any]:
    return {
        "values": group.values,
        "job_ids": group.job_ids,
        "quarters": [{"percent": one.percent, "metrics": _spreads(one.figures)} for one in group.quarters],
        "steps_until": _spread(group.until_step),
        "seconds_until": _spread(group.until_seconds),
        "at_step": None if group.at_step is None else _spreads(group.at_step),
    }


def _spread(one: Spread | None) -> dict[str, Any] | None:
    return None if one is None else vars(one)


def _spreads(figures: Mapping[str, Spread | None]) -> dict[str, dict[str, Any] | None]:
    return {name: _spread(one) for name, one in figures.items()}


def compared_series(found: Sequence[tuple[str, LossEnvelope]]) -> schemas.ComparedSeries:
    """The answer to `GET /compare/series`."""
    return schemas.ComparedSeries(
        jobs=[
            schemas.JobEnvelope(
                job_id=job_id, bucket_steps=one.width, last_step=one.last_step, low=one.low, high=one.high
            )
            for job_id, one in found
        ]
    )


def preset(found: Preset) -> schemas.PresetView:
    """An experiment as `GET /presets` answers it."""
    return schemas.PresetView(
        name=found.name,
        look_at=schemas.LookAt(**found.look_at),
        sweep=schemas.SweepRequest(**found.request()),
        compare=schemas.PresetCompare(metric=list(found.metrics), perplexity=found.perplexity),
    )


def best_percent(rows: Sequence[Checkpoint]) -> int | None:
    """The percent of the first checkpoint with the lowest validation loss; None where none has one."""
    losses = {row.percent: row.metrics.get("val_loss") for row in rows}
    measured = {percent: loss for percent, loss in losses.items() if loss is not None}
    return min(measured, key=lambda percent: (measured[percent], percent), default=None)


def _is_best(row: Checkpoint, best: int | None) -> dict[str, bool]:
    return {} if row.metrics.get("val_loss") is None or best is None else {"best": row.percent == best}


def checkpoint_metrics(row: Checkpoint, *, best: int | None = None, tokens: bool = True) -> schemas.CheckpointMetrics:
    """A checkpoint as `GET /jobs/{id}/metrics` answers it. `best`: `best_percent` of its job, where it is known."""
    metrics = row.metrics | _large(row)
    if not tokens and (reconstruction := metrics.get("reconstruction")) is not None:
        metrics["reconstruction"] = reconstruction | {"tokens": None}
    return schemas.CheckpointMetrics.model_validate(metrics | _identity(row) | _is_best(row, best))


def _large(row: Checkpoint) -> dict[str, Any]:
    """The parts of a checkpoint's metrics that lie in columns of their own."""
    return {name: value for name in LARGE_METRICS if (value := getattr(row, name)) is not None}


_LARGE_PARTS = frozenset({"reconstruction", "continuation", "moe"})
"""Parts of a checkpoint's metrics that a list of checkpoints leaves out."""


def checkpoint(row: Checkpoint, *, best: int | None) -> schemas.CheckpointView:
    """A checkpoint as `GET /jobs/{id}/checkpoints` answers it. `best`: `best_percent` of its job."""
    figures = {name: value for name, value in row.metrics.items() if name not in _LARGE_PARTS}
    return schemas.CheckpointView.model_validate(figures | _identity(row) | _is_best(row, best) | {"files": row.files})


def _identity(row: Checkpoint) -> dict[str, Any]:
    return {"percent": row.percent, "step": row.step, "epoch": row.epoch, "created_at": row.created_at}


def metrics(
    row: Job, checkpoints: Sequence[Checkpoint], steps: dict[str, list[Any]], *, tokens: bool
) -> schemas.Metrics:
    """The metrics of a job: checkpoints and step series."""
    return schemas.Metrics(
        job_id=row.id,
        status=row.status,
        checkpoints=[checkpoint_metrics(one, best=best_percent(checkpoints), tokens=tokens) for one in checkpoints],
        steps=schemas.StepSeries.model_validate(steps),
    )


def reconstruction(row: Checkpoint, start: int, count: int) -> schemas.ReconstructionPage:
    """A page of a checkpoint's reconstruction."""
    recorded = schemas.Reconstruction.model_validate((row.metrics | _large(row))["reconstruction"])
    tokens = recorded.tokens or []
    end = min(start + count, len(tokens))
    return schemas.ReconstructionPage(
        job_id=row.job_id,
        percent=row.percent,
        start=start,
        n_tokens=len(tokens),
        truncated=recorded.truncated,
        data=tokens[start:end],
        next_from=end if end < len(tokens) else None,
    )


def worker(row: Worker, running: Sequence[Job]) -> schemas.WorkerView:
    """A worker as `GET /workers` answers it."""
    return schemas.WorkerView(
        id=row.id,
        name=row.name,
        host=row.host,
        pid=row.pid,
        devices=[schemas.Device.model_validate(device) for device in row.devices],
        slots=row.slots,
        versions=row.versions,
        busy_slots=len({one.cohort_id or one.id for one in running}),
        current_jobs=[one.id for one in running],
        started_at=row.started_at,
        last_seen_at=row.last_seen_at,
        stopped_at=row.stopped_at,
    )


def _logprobs(given: Sequence[LogProbsWithBytes] | None) -> list[schemas.ChosenToken] | None:
    if given is None:
        return None
    return [
        schemas.ChosenToken(
            token=one.chosen.token,
            text=one.chosen.text,
            logprob=one.chosen.logprob,
            alternatives=[schemas.TokenLogProb(**dict(other)) for other in one.likeliest],
        )
        for one in given
    ]


def generate_chunk(chunk: Chunk, target: int = 0) -> schemas.GenerateChunk:
    """The `chunk` event of a stream."""
    return schemas.GenerateChunk(
        target=target,
        index=chunk.index,
        text=chunk.text,
        tokens=list(chunk.tokens),
        logprobs=_logprobs(chunk.logprobs),
        finish_reason=chunk.finish_reason,
    )


def generate_end(address: Address, seed: int, summary: Summary, target: int = 0) -> schemas.GenerateEnd:
    """The `end` event of a target."""
    return schemas.GenerateEnd(
        target=target,
        job_id=address.job_id,
        checkpoint=address.percent,
        usage=schemas.Usage(
            prompt_tokens=summary.prompt_tokens,
            completion_tokens=summary.completion_tokens,
            total_tokens=summary.prompt_tokens + summary.completion_tokens,
        ),
        timing=summary.timing,
        seed=seed,
        window_slid=summary.window_slid,
        numerics=summary.numerics,
    )


def generated(
    address: Address, prompt: str, seed: int, result: EngineResult, target: int = 0
) -> schemas.GenerateResponse:
    """The answer of one checkpoint to `POST /generate`."""
    choices = [
        schemas.Choice(
            index=choice.index,
            text=choice.text,
            tokens=list(choice.tokens),
            finish_reason=choice.finish_reason,
            logprobs=_logprobs(choice.logprobs),
        )
        for choice in result.choices
    ]
    end = generate_end(address, seed, result.summary, target)
    return schemas.GenerateResponse(**dict(end), prompt=prompt, choices=choices)


def scored(address: Address, text: str, answer: Scored, copied: schemas.CopiedSpan | None) -> schemas.ScoreResponse:
    """The answer to `POST /score`."""
    known = [loss for loss in answer.losses if loss is not None]
    total = math.fsum(known) if len(known) == len(answer.losses) else None
    mean = None if total is None else total / len(known)
    n_bytes = len(text.encode()) - answer.tokens[1].byte_offset
    return schemas.ScoreResponse(
        job_id=address.job_id,
        checkpoint=address.percent,
        n_tokens=len(answer.tokens),
        loss=mean,
        total_loss=total,
        perplexity=None if mean is None else perplexity(mean),
        bits_per_byte=None if total is None else total / math.log(2) / n_bytes,
        tokens=[
            schemas.ScoredToken(loss=loss, **token.model_dump())
            for token, loss in zip(answer.tokens, (None, *answer.losses), strict=True)
        ],
        copied=copied,
    )


def inspected(address: Address, answer: Inspected) -> schemas.InspectResponse:
    """The answer to `POST /inspect`."""
    return schemas.InspectResponse(
        job_id=address.job_id,
        checkpoint=address.percent,
        n_unread=answer.n_unread,
        tokens=answer.tokens,
        likeliest=answer.likeliest,
        attention=answer.attention,
        routing=answer.routing,
        routed_tokens=[
            schemas.RoutedToken(
                **token.model_dump(),
                experts=[layer.chosen[t] for layer in answer.routing],
                gates=[layer.gates[t] for layer in answer.routing],
            )
            for t, token in enumerate(answer.tokens if answer.routing else ())
        ],
    )
