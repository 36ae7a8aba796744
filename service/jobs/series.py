"""The step series: written in batches, kept with the extremes of its blocks and its envelope, read thinned.

A thousand points of a million steps cost about what a thousand steps do: thinning reads one row per 256 steps (or per
65,536), picks the steps at which a column is smallest and largest, and fetches those. Knows no job status; whoever
writes holds the job's fence.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import sqlalchemy as sa
from sqlmodel import Session

from service.database.schema import table
from service.database.upsert import insert_or_update
from service.jobs.envelope import cut_envelope, widen_envelopes
from service.jobs.tables import SERIES, Step, StepBlock

BLOCK_SIZES = (256, 65_536)
MIN_POINTS = 2 * len(SERIES) + 2
"""A minimum and a maximum of each column, the first step and the last."""

ROWS_PER_POINT = 4
"""Block rows that thinning may read for each point it returns; with the points themselves, five rows a point."""

Columns = Mapping[str, Sequence[Any]]
"""`{"step": [...], "train_loss": [...], "lr": [...], "grad_norm": [...]}`, all of one length, steps ascending."""

Extremes = dict[str, list[Any]]
"""`{column: [minimum, its step, maximum, its step]}`; the first step wins a tie."""

_steps = table(Step)
_blocks = table(StepBlock)
_block_key = (_blocks.c.job_id, _blocks.c.size, _blocks.c.block)
_columns = (_steps.c.step, *(_steps.c[name] for name in SERIES))


def write_steps(session: Session, batches: Mapping[str, Columns]) -> None:
    """Write a batch of steps of each of these jobs, by job id, and bring the blocks and envelopes they touch up to
    date; one statement for all jobs of each that is needed. Figures that are not finite become null.

    Writing a step again replaces it, so that a batch whose commit was in doubt can be sent a second time.
    """
    rows: list[dict[str, Any]] = []
    fresh: dict[tuple[str, int, int], Extremes] = {}
    losses: dict[str, list[tuple[int, float | None]]] = {}
    for job_id, columns in batches.items():
        if not columns["step"]:
            continue
        steps, figures = columns["step"], {name: list(map(_finite, columns[name])) for name in SERIES}
        rows += [
            {"job_id": job_id, "step": step, **dict(zip(SERIES, row, strict=True))}
            for step, *row in zip(steps, *figures.values(), strict=True)
        ]
        for block, extremes in _by_block(steps, figures, BLOCK_SIZES[0]):
            for size in BLOCK_SIZES:
                _widen(fresh.setdefault((job_id, size, block * BLOCK_SIZES[0] // size), {}), extremes)
        losses[job_id] = list(zip(steps, figures["train_loss"], strict=True))
    if not rows:
        return
    insert_or_update(session, Step, rows)
    stored = session.execute(
        sa.select(*_block_key, _blocks.c.extremes).where(sa.tuple_(*_block_key).in_(list(fresh)))
    ).all()
    for *key, extremes in stored:
        fresh[key[0], key[1], key[2]] = _widen(extremes, fresh[key[0], key[1], key[2]])
    _write_blocks(session, fresh)
    widen_envelopes(session, losses)


def delete_steps_after(session: Session, job_id: str, step: int) -> None:
    """Delete every step past `step`, and recompute the blocks without them."""
    session.execute(sa.delete(_steps).where(_steps.c.job_id == job_id, _steps.c.step > step))
    finer: int | None = None
    for size in BLOCK_SIZES:
        block = step // size
        first = block * size
        session.execute(
            sa.delete(_blocks).where(_blocks.c.job_id == job_id, _blocks.c.size == size, _blocks.c.block >= block)
        )
        extremes: Extremes = {}
        if finer is None:
            rows = sa.select(*_columns).where(_steps.c.job_id == job_id, _steps.c.step >= first)
            for row in session.execute(rows.order_by(_steps.c.step)).mappings():
                _widen(extremes, _of_step(dict(row)))
        else:
            for part in _read_blocks(session, job_id, finer, first // finer):
                _widen(extremes, part)
        if extremes:
            _write_blocks(session, {(job_id, size, block): extremes})
        finer = size
    cut_envelope(session, job_id, step)


def read_series(
    session: Session, job_id: str, points: int, *, from_step: int | None = None, to_step: int | None = None
) -> dict[str, list[Any]]:
    """At most `points` steps of a job, by column, keeping the minima and maxima of every column.

    `from_step`, `to_step`: only steps from the one to the other, both included; of a block of steps that lies partly
    outside, an extreme may be missing. The range is cut into buckets; each gives the steps where a column is smallest
    and largest, and evenly spaced steps fill what is left. Reads at most five rows for each point, however long the
    series. Raises ValueError for fewer points than `MIN_POINTS`.
    """
    if points < MIN_POINTS:
        raise ValueError(f"points must be at least {MIN_POINTS}")
    of_job = _steps.c.job_id == job_id
    first = session.execute(sa.select(_steps.c.step).where(of_job).order_by(_steps.c.step).limit(1)).scalar()
    last = session.execute(sa.select(_steps.c.step).where(of_job).order_by(_steps.c.step.desc()).limit(1)).scalar()
    if first is None or last is None:
        return _by_column([])
    first, last = max(first, from_step or first), min(last, to_step or last)
    of_job &= _steps.c.step.between(first, last)
    n_steps = last - first + 1
    if n_steps <= points:
        return _by_column(session.execute(sa.select(*_columns).where(of_job).order_by(_steps.c.step)).all())
    size = next((size for size in BLOCK_SIZES if n_steps / size < ROWS_PER_POINT * points), BLOCK_SIZES[-1])
    chosen = _choose(_read_blocks(session, job_id, size, first // size, last // size), first, last, points)
    return _by_column(
        session.execute(
            sa.select(*_columns).where(of_job, _steps.c.step.in_(chosen)).order_by(_steps.c.step)
        ).all()
    )  # fmt: skip


def read_steps_after(session: Session, job_id: str, step: int, limit: int) -> list[sa.Row[Any]]:
    """The next `limit` rows (step, train_loss, lr, grad_norm) past `step`, to read a series page by page."""
    query = sa.select(*_columns).where(_steps.c.job_id == job_id, _steps.c.step > step)
    return list(session.execute(query.order_by(_steps.c.step).limit(limit)).all())


def _choose(blocks: list[Extremes], first: int, last: int, points: int) -> set[int]:
    chosen = {first, last}
    n_buckets = min(len(blocks), max(1, (points - 2) // (2 * len(SERIES))))
    buckets: list[Extremes] = [{} for _ in range(n_buckets)]
    for index, block in enumerate(blocks):
        _widen(buckets[index * n_buckets // len(blocks)], block)
    for bucket in buckets:
        for _, low_step, _, high_step in bucket.values():
            chosen |= {low_step, high_step}
    left = points - len(chosen)
    chosen.update(first + (last - first) * part // (left + 1) for part in range(1, left + 1))
    return chosen


def _by_block(steps: Sequence[int], figures: Columns, size: int) -> Iterator[tuple[int, Extremes]]:
    """The blocks that a batch of steps touches, each with the extremes of the batch in it."""
    for block, group in groupby(range(len(steps)), key=lambda place: steps[place] // size):
        places = list(group)
        part = slice(places[0], places[-1] + 1)
        yield block, _of_steps(steps[part], {name: column[part] for name, column in figures.items()})


def _of_steps(steps: Sequence[int], figures: Columns) -> Extremes:
    extremes: Extremes = {}
    for name, column in figures.items():
        if known := [figure for figure in column if figure is not None]:
            low, high = min(known), max(known)
            extremes[name] = [low, steps[column.index(low)], high, steps[column.index(high)]]
    return extremes


def _of_step(row: Mapping[str, Any]) -> Extremes:
    return {name: [row[name], row["step"]] * 2 for name in SERIES if row[name] is not None}


def _widen(extremes: Extremes, other: Extremes) -> Extremes:
    """Widen `extremes` in place by `other`."""
    for name, (low, low_step, high, high_step) in other.items():
        mine = extremes.get(name)
        if mine is None:
            extremes[name] = [low, low_step, high, high_step]
            continue
        mine[:2] = min(mine[:2], [low, low_step])
        if (high, -high_step) > (mine[2], -mine[3]):
            mine[2:] = [high, high_step]
    return extremes


def _read_blocks(
    session: Session, job_id: str, size: int, first_block: int, last_block: int | None = None
) -> list[Extremes]:
    query = sa.select(_blocks.c.extremes).where(
        _blocks.c.job_id == job_id, _blocks.c.size == size, _blocks.c.block >= first_block
    )
    if last_block is not None:
        query = query.where(_blocks.c.block <= last_block)
    return list(session.execute(query.order_by(_blocks.c.block)).scalars())


def _write_blocks(session: Session, blocks: Mapping[tuple[str, int, int], Extremes]) -> None:
    """`blocks`: by job id, size and number."""
    insert_or_update(
        session,
        StepBlock,
        [
            {"job_id": job_id, "size": size, "block": block, "extremes": found}
            for (job_id, size, block), found in blocks.items()
        ],
    )


def _finite(figure: float | None) -> float | None:
    return figure if figure is not None and math.isfinite(figure) else None


def _by_column(rows: Iterable[Sequence[Any]]) -> dict[str, list[Any]]:
    names = ("step", *SERIES)
    columns = list(zip(*rows, strict=True)) or [()] * len(names)
    return {name: list(column) for name, column in zip(names, columns, strict=True)}
