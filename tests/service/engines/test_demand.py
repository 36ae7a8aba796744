"""How many workers the queue wants."""

from datetime import timedelta

import pytest

from service.database.database import Database
from service.engines.demand import Demand, read_demand, workers_wanted
from service.engines.fleet import Fleet
from service.jobs.workers import WorkerIdentity, worker_started
from tests.databases import EITHER
from tests.queued import claim, submit

MANY = Fleet("many", 0, 64)


@pytest.mark.parametrize(
    ("waiting", "running", "least", "most", "slots", "wanted"),
    [
        (0, 0, 0, 64, 1, 0),
        (0, 0, 2, 64, 1, 2),
        (1, 0, 0, 64, 1, 1),
        (500, 0, 0, 64, 1, 64),
        (3, 4, 0, 64, 1, 7),
        (1, 4, 0, 64, 4, 2),
        (0, 4, 0, 64, 4, 1),
        (9, 0, 0, 64, 4, 3),
    ],
)
def test_as_many_workers_as_jobs_need_within_the_bounds(
    waiting: int, running: int, least: int, most: int, slots: int, wanted: int
) -> None:
    assert workers_wanted(Demand(waiting, running), Fleet("many", least, most, slots=slots)) == wanted


def test_the_slots_of_every_gpu_of_a_worker_count() -> None:
    assert workers_wanted(Demand(16, 0), Fleet("many", 0, 64, gpus=4, slots=2)) == 2


def started(db: Database, name: str, memory_bytes: int = 2**30) -> WorkerIdentity:
    device = {"device": "cpu:0", "name": "", "memory_bytes": memory_bytes}
    worker = WorkerIdentity(name=name, devices=[device], memory_bytes=memory_bytes)
    worker_started(db, worker)
    return worker


@EITHER
def test_running_jobs_of_other_workers_ask_for_none(db: Database) -> None:
    for name in ("many-0", "many-0-1", "many", "manyfold-1"):
        submit(db)
        claim(db, started(db, name))
    submit(db)
    assert read_demand(db, MANY) == Demand(waiting=1, running=1)


@EITHER
def test_a_job_that_waits_for_a_date_asks_for_no_worker(db: Database) -> None:
    submit(db, run_at=db.time() + timedelta(hours=1))
    assert read_demand(db, MANY) == Demand(0, 0)


@EITHER
def test_a_job_that_no_worker_of_the_fleet_has_the_memory_for_asks_for_none_again_and_again(db: Database) -> None:
    submit(db, training_bytes=2**31)
    submit(db, training_bytes=2**20)
    assert read_demand(db, MANY).waiting == 2  # who knows what its workers will have
    started(db, "many-3")
    assert read_demand(db, MANY).waiting == 1
