"""Writes of several slots that go together."""

import threading
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from service.database.database import Database
from service.errors import DatabaseUnavailable, LeaseLost, TransactionBlocked
from service.jobs import queue
from service.jobs.claim_order import jobs
from service.jobs.lease import Intents
from service.jobs.queue import Finish
from service.jobs.recording import Report
from service.jobs.workers import WorkerIdentity
from tests.databases import ONLY_POSTGRESQL
from tests.queued import running, submit
from tests.races import Races
from worker.shared_writes import SharedWrites, Together

TIMEOUT_SECONDS = 30


class Doing:
    """Something done in batches, the first of which waits until it is let go."""

    def __init__(self, fails_with: BaseException | None = None, fails_for: Collection[int] = (2,)) -> None:
        self.batches: list[list[int]] = []
        self.alone = threading.Barrier(5)
        """What fails together is done alone, but at the same time."""
        self.arrived, self.go = threading.Event(), threading.Event()
        self._fails_with, self._fails_for = fails_with, set(fails_for)
        self.together = Together[int, int](self)

    def __call__(self, requests: Sequence[int]) -> list[int | LeaseLost]:
        self.batches.append(sorted(requests))
        self.arrived.set()
        assert self.go.wait(TIMEOUT_SECONDS)
        if len(requests) == 1 and requests != [0]:
            self.alone.wait(TIMEOUT_SECONDS)
        if self._fails_with is not None and self._fails_for <= set(requests):
            raise self._fails_with
        return [LeaseLost("3") if request == 3 else 10 * request for request in requests]

    def all_at_once(self) -> dict[int, int | BaseException]:
        """The outcomes of 0, and of 1 to 5, which come while 0 is on its way."""
        with ThreadPoolExecutor(6) as pool:
            calls = {0: pool.submit(self.together, 0)}
            assert self.arrived.wait(TIMEOUT_SECONDS)
            calls |= {number: pool.submit(self.together, number) for number in range(1, 6)}
            while len(self.together._waiting) < 6:
                pass
            self.go.set()
            return {number: call.exception(TIMEOUT_SECONDS) or call.result() for number, call in calls.items()}  # type: ignore[misc]


def test_what_comes_while_another_is_on_its_way_goes_together() -> None:
    doing = Doing()
    outcomes = doing.all_at_once()
    assert doing.batches == [[0], [1, 2, 3, 4, 5]]
    assert isinstance(outcomes.pop(3), LeaseLost)
    assert outcomes == {0: 0, 1: 10, 2: 20, 4: 40, 5: 50}


@pytest.mark.parametrize("error", [ValueError("a bug"), TransactionBlocked("a bug")], ids=["a bug", "a lock"])
def test_one_that_cannot_be_done_fails_alone_and_holds_up_nobody(error: Exception) -> None:
    doing = Doing(error)
    outcomes = doing.all_at_once()
    assert doing.batches[1] == [1, 2, 3, 4, 5]
    assert sorted(doing.batches[2:]) == [[1], [2], [3], [4], [5]]
    assert (str(outcomes.pop(2)), str(outcomes.pop(3))) == ("a bug", "3")
    assert outcomes == {0: 0, 1: 10, 4: 40, 5: 50}


def test_a_database_out_of_reach_fails_for_all_at_once() -> None:
    doing = Doing(DatabaseUnavailable("away"))
    outcomes = doing.all_at_once()
    assert len(doing.batches) == 2
    assert [type(outcomes[number]) for number in range(1, 6)] == [DatabaseUnavailable] * 5


def test_a_thread_that_dies_with_the_writes_of_others_leaves_them_to_be_written() -> None:
    doing = Doing(SystemExit(), fails_for=[1, 2, 3, 4, 5])
    outcomes = doing.all_at_once()
    (dead,) = (number for number, outcome in outcomes.items() if isinstance(outcome, SystemExit))
    assert isinstance(outcomes.pop(3), SystemExit if dead == 3 else LeaseLost)
    assert {number: outcome for number, outcome in outcomes.items() if number != dead} == {
        number: 10 * number for number in (0, 1, 2, 4, 5) if number != dead
    }
    assert doing.together._waiting == []


@ONLY_POSTGRESQL  # SQLite locks no rows
def test_a_job_whose_row_another_transaction_holds_does_not_cost_the_others_their_leases(
    db: Database, worker: WorkerIdentity, races: Races
) -> None:
    held, one, other = (running(db, worker) for _ in range(3))

    @sa.event.listens_for(db.engine, "begin")
    def _wait_briefly(connection: sa.Connection) -> None:
        connection.exec_driver_sql("SET LOCAL lock_timeout = '0.2s'")

    writes = SharedWrites(db, worker)
    with db.write() as session, ThreadPoolExecutor(2) as pool:
        session.execute(sa.select(jobs.c.id).where(jobs.c.id == held.job_id).with_for_update())
        first = races.hold(writes.report, Report(one))
        blocked = pool.submit(writes.report, Report(held))
        renewed = pool.submit(writes.report, Report(other))
        while len(writes.report._waiting) < 3:
            pass
        first.let_go()
        assert renewed.result(TIMEOUT_SECONDS) == Intents(cancel=False, pause=False)
        assert isinstance(blocked.exception(TIMEOUT_SECONDS), TransactionBlocked)


def test_slots_that_wait_for_a_claim_get_the_next_jobs_in_one(
    db: Database, worker: WorkerIdentity, races: Races
) -> None:
    ids = [submit(db).id for _ in range(3)]
    writes = SharedWrites(db, worker)
    first = races.hold(writes.claim)
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(writes.claim) for _ in range(4)]
        while len(writes._claims._waiting) < 5:
            pass
        (claim,) = first.let_go()
        assert claim.job_id == ids[0]
        found = [other.result(TIMEOUT_SECONDS) for other in others]
    assert sorted(one.job_id for claims in found for one in claims) == sorted(ids[1:])


def test_a_worker_looks_for_jobs_only_where_it_does_not_know_that_some_wait(
    db: Database, worker: WorkerIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(db), submit(db)
    looks = []
    read = db.read
    monkeypatch.setattr(db, "read", lambda: looks.append(None) or read())  # type: ignore[func-returns-value]
    writes = SharedWrites(db, worker)
    counts = []
    for _ in range(4):
        found = writes.claim()
        counts.append((len(found), len(looks)))
    # The third finds that there is nothing, which may be another revision, too; the fourth looks before it locks.
    assert counts == [(1, 1), (1, 1), (0, 2), (0, 3)]


def test_a_slot_that_has_lost_its_job_learns_it_and_the_others_end_theirs(
    db: Database, worker: WorkerIdentity, races: Races
) -> None:
    lost, one, other = (running(db, worker) for _ in range(3))
    queue.release(db, lost)
    writes = SharedWrites(db, worker)
    first = races.hold(writes.finish, Finish(one, "succeeded"))
    with ThreadPoolExecutor(2) as pool:
        refused, ended = (pool.submit(writes.finish, Finish(claim, "succeeded")) for claim in (lost, other))
        while len(writes.finish._waiting) < 3:
            pass
        assert first.let_go().status == "succeeded"
        assert ended.result(TIMEOUT_SECONDS).status == "succeeded"
        with pytest.raises(LeaseLost):
            refused.result(TIMEOUT_SECONDS)


def test_what_one_slot_has_for_several_jobs_goes_together() -> None:
    batches: list[int] = []

    def do(requests: Sequence[int]) -> list[int | LeaseLost]:
        batches.append(len(requests))
        if 7 in requests:
            raise ValueError("a bug")
        return [LeaseLost("3") if request == 3 else request for request in requests]

    together = Together[int, int](do)
    outcomes = together.all(list(range(6)))
    assert batches == [6]
    assert isinstance(outcomes.pop(3), LeaseLost)
    assert outcomes == [0, 1, 2, 4, 5]
    one, seven, two = together.all([1, 7, 2])
    assert (one, str(seven), two) == (1, "a bug", 2)
    assert sorted(batches[1:]) == [1, 1, 1, 3]
