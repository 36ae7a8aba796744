"""The step series: whatever is written, in whatever batches, thinning keeps the extremes and reads few rows."""

import math
from collections.abc import Callable, Iterator
from itertools import count, pairwise
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.database.database import Database
from service.database.schema import table
from service.jobs import reads, series
from service.jobs.new_job import NewJob
from service.jobs.series import BLOCK_SIZES, MIN_POINTS, Columns
from service.jobs.submit import submit_job
from service.jobs.tables import SERIES, Step, StepBlock

steps, blocks = table(Step), table(StepBlock)


@pytest.fixture
def job_id(db: Database) -> str:
    return submit_job(db, NewJob(text="a b", config={}))[0].id


def write(db: Database, job_id: str, columns: Columns) -> None:
    with db.write() as session:
        series.write_steps(session, {job_id: columns})


def rewind(db: Database, job_id: str, step: int) -> None:
    with db.write() as session:
        series.delete_steps_after(session, job_id, step)


def clear(db: Database) -> None:
    with db.write() as session:
        session.execute(sa.delete(steps))
        session.execute(sa.delete(blocks))


def batch(first: int, losses: list[float | None]) -> Columns:
    numbers = list(range(first, first + len(losses)))
    return {
        "step": numbers,
        "train_loss": losses,
        "lr": [1e-4 * number for number in numbers],
        "grad_norm": [None if loss is None else -loss for loss in losses],
    }


def all_rows(db: Database, job_id: str) -> list[Any]:
    return reads.steps_after(db, job_id, -1, 10_000_000)


def stored_blocks(db: Database, job_id: str) -> dict[tuple[int, int], Any]:
    with db.read() as session:
        rows = session.execute(
            sa.select(blocks.c.size, blocks.c.block, blocks.c.extremes).where(blocks.c.job_id == job_id)
        )
        return {(size, block): extremes for size, block, extremes in rows}


def extremes_of(rows: list[Any]) -> dict[str, list[Any]]:
    """Straight from the definition: the smallest and the largest figure, each with the first step that has it."""
    found = {}
    for name in SERIES:
        figures = [(getattr(row, name), row.step) for row in rows if getattr(row, name) is not None]
        if figures:
            low = min(figures)
            high = max(figures, key=lambda one: (one[0], -one[1]))
            found[name] = [*low, *high]
    return found


def test_a_short_series_is_given_whole(db: Database, job_id: str) -> None:
    write(db, job_id, {"step": [1, 2], "train_loss": [9.0, 8.5], "lr": [1e-4, 2e-4], "grad_norm": [1.0, None]})
    write(db, job_id, batch(3, [7.0]))
    assert reads.series(db, job_id, 10) == {
        "step": [1, 2, 3],
        "train_loss": [9.0, 8.5, 7.0],
        "lr": [1e-4, 2e-4, 1e-4 * 3],
        "grad_norm": [1.0, None, -7.0],
    }


def test_a_job_without_steps_has_empty_columns(db: Database, job_id: str) -> None:
    assert reads.series(db, job_id) == {"step": [], "train_loss": [], "lr": [], "grad_norm": []}
    write(db, job_id, batch(1, []))
    assert stored_blocks(db, job_id) == {}


def test_what_is_not_finite_becomes_null(db: Database, job_id: str) -> None:
    write(db, job_id, batch(1, [math.nan, math.inf, -math.inf, 1.0]))
    found = reads.series(db, job_id)
    assert found["train_loss"] == [None, None, None, 1.0]
    assert stored_blocks(db, job_id)[256, 0]["train_loss"] == [1.0, 4, 1.0, 4]


def test_a_batch_that_is_sent_twice_is_written_once(db: Database, job_id: str) -> None:
    for _ in range(2):
        write(db, job_id, batch(1, [3.0, 1.0, 2.0]))
    assert reads.series(db, job_id)["train_loss"] == [3.0, 1.0, 2.0]


def test_too_few_points_are_refused(db: Database, job_id: str) -> None:
    with pytest.raises(ValueError, match=str(MIN_POINTS)):
        reads.series(db, job_id, MIN_POINTS - 1)


def test_jobs_do_not_mix(db: Database, job_id: str) -> None:
    other = submit_job(db, NewJob(text="a b", config={}))[0].id
    write(db, job_id, batch(1, [1.0] * 300))
    write(db, other, batch(1, [2.0] * 300))
    rewind(db, other, 0)
    assert reads.series(db, other)["step"] == []
    assert len(reads.series(db, job_id)["step"]) == 300
    assert set(stored_blocks(db, job_id)) == {(256, 0), (256, 1), (65_536, 0)}


def test_a_spike_survives_thinning_wherever_it_is(db: Database, job_id: str) -> None:
    losses: list[float | None] = [5.0 + 0.001 * math.sin(step) for step in range(20_000)]
    losses[7], losses[12_345], losses[19_998] = 99.0, -99.0, 98.0
    write(db, job_id, batch(1, losses))
    found = reads.series(db, job_id, 50)
    assert len(found["step"]) <= 50
    assert {99.0, -99.0, 98.0} <= set(found["train_loss"])
    assert (found["step"][0], found["step"][-1]) == (1, 20_000)
    assert found["step"] == sorted(set(found["step"]))


def test_thinning_fills_up_with_evenly_spaced_steps(db: Database, job_id: str) -> None:
    write(db, job_id, batch(1, [5.0] * 5_000))
    found = reads.series(db, job_id, 1_000)["step"]
    assert 900 < len(found) <= 1_000
    assert max(after - before for before, after in pairwise(found)) <= 10


figure = st.none() | st.floats(-1e6, 1e6)
operation = st.one_of(
    st.tuples(st.just("write"), st.lists(figure, min_size=1, max_size=12)),
    st.tuples(st.just("rewind"), st.floats(0, 1)),
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(operation, min_size=1, max_size=10), st.integers(MIN_POINTS, 40))
def test_blocks_are_what_the_steps_say_after_any_writes_and_rewinds(
    db: Database, job_id: str, small_blocks: None, operations: list[tuple[str, Any]], points: int
) -> None:
    clear(db)
    last = 0
    for kind, value in operations:
        if kind == "write":
            write(db, job_id, batch(last + 1, value))
            last += len(value)
        else:
            last = int(last * value)
            rewind(db, job_id, last)
    rows = all_rows(db, job_id)
    assert [row.step for row in rows] == list(range(1, last + 1))
    expected = {}
    for size in series.BLOCK_SIZES:
        for block in {row.step // size for row in rows}:
            found = extremes_of([row for row in rows if row.step // size == block])
            if found:
                expected[size, block] = found
    # A block in which every figure is null may be there, empty, or not.
    assert {key: found for key, found in stored_blocks(db, job_id).items() if found} == expected
    thinned = reads.series(db, job_id, points)
    assert len(thinned["step"]) <= points
    for name, (low, _, high, _) in extremes_of(rows).items():
        kept = [value for value in thinned[name] if value is not None]
        assert (min(kept), max(kept)) == (low, high)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that a short series has many of both sizes."""
    monkeypatch.setattr(series, "BLOCK_SIZES", (4, 16))


# A million steps


MILLION = 1_000_000
SPIKE, DIP = 123_457, 876_543


@pytest.fixture
def long_job(db: Database, job_id: str) -> str:
    """A job of a million steps: rows made by the database, blocks by hand, for speed."""
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :last)"
    if not db.is_sqlite:
        numbers = "WITH n AS (SELECT i FROM generate_series(1, :last) AS i)"
    # The loss is the step's number, but for two steps.
    rows = f"""{numbers} INSERT INTO steps (job_id, step, train_loss, lr, grad_norm)
        SELECT :job_id, i, CASE i WHEN :spike THEN 9e9 WHEN :dip THEN -9e9 ELSE i END, 0.1, i FROM n"""  # noqa: S608
    with db.write() as session:
        if not db.is_sqlite:  # do not look for the job a million times
            session.execute(sa.text("SET LOCAL session_replication_role = replica"))
        session.execute(sa.text(rows), {"last": MILLION, "job_id": job_id, "spike": SPIKE, "dip": DIP})
        for size in BLOCK_SIZES:
            made = []
            for block in range(MILLION // size + 1):
                first, last = max(1, block * size), min(MILLION, block * size + size - 1)
                low = [-9e9, DIP] if first <= DIP <= last else [first, first]
                high = [9e9, SPIKE] if first <= SPIKE <= last else [last, last]
                extremes = {
                    "train_loss": [*low, *high],
                    "lr": [0.1, first] * 2,
                    "grad_norm": [first, first, last, last],
                }
                made.append({"job_id": job_id, "size": size, "block": block, "extremes": extremes})
            session.execute(sa.insert(blocks), made)
    return job_id


def test_a_thousand_points_of_a_million_steps_visit_five_thousand_rows(db: Database, long_job: str) -> None:
    with db.read() as session:
        assert 1_000 < visits(db, session, lambda: series.read_series(session, long_job, 1_000)) <= 5_000
    found = reads.series(db, long_job, 1_000)
    assert 900 < len(found["step"]) <= 1_000
    assert (max(found["train_loss"]), min(found["train_loss"])) == (9e9, -9e9)
    assert (found["step"][0], found["step"][-1]) == (1, MILLION)


STEPS_OF_SQLITE_PER_ROW = 8
"""Instructions that SQLite's interpreter needs for one row of these queries, at the least."""


def visits(db: Database, session: Any, call: Callable[[], object]) -> float:
    """The rows that the statements of `call` visit: as PostgreSQL counts them, or by SQLite's own instructions."""
    connection = session.connection()
    if db.is_sqlite:
        ticks = count()
        driver = connection.connection.dbapi_connection
        driver.set_progress_handler(lambda: next(ticks) * 0, STEPS_OF_SQLITE_PER_ROW)
        call()
        driver.set_progress_handler(None, 0)
        return next(ticks)
    statements: list[tuple[str, Any]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        statements.append((statement, parameters))

    sa.event.listen(db.engine, "before_cursor_execute", note)
    call()
    sa.event.remove(db.engine, "before_cursor_execute", note)
    plans = [
        connection.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters).scalar_one()[0]["Plan"]
        for statement, parameters in statements
    ]
    return sum(_visited(node) for plan in plans for node in _nodes(plan) if node["Node Type"] in _READS_ROWS)


_READS_ROWS = ("Seq Scan", "Index Scan", "Index Only Scan", "Bitmap Heap Scan")


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", []):
        yield from _nodes(part)


def _visited(node: dict[str, Any]) -> float:
    loops = node["Actual Loops"]
    removed = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
    return float((node["Actual Rows"] + removed) * loops)


def test_a_part_of_a_series_is_read_as_finely_as_a_whole_one(db: Database, job_id: str) -> None:
    write(db, job_id, batch(1, [math.sin(number) for number in range(3000)]))

    def part(first: int | None, last: int | None, points: int) -> list[int]:
        return reads.series(db, job_id, points, from_step=first, to_step=last)["step"]

    assert part(1000, 1019, 50) == list(range(1000, 1020))
    assert part(2990, None, 50) == list(range(2990, 3001))
    assert part(4000, None, 50) == part(20, 10, 50) == []
    thinned = part(1000, 2000, 100)
    assert (thinned[0], thinned[-1]) == (1000, 2000)
    assert 20 < len(thinned) <= 100
