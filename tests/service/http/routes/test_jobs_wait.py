"""Waiting for a job's status, through a real server."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from service.jobs import queue_position, reads
from service.jobs.labels import relabel
from tests.api import Api
from tests.service.http.routes.problem_code import code


def test_a_wait_ends_with_the_status(api: Api) -> None:
    job_id = api.submit()["id"]
    asked = threading.Event()
    with ThreadPoolExecutor(1) as pool:

        def wait() -> Any:
            asked.set()
            return api.http.get(f"/jobs/{job_id}", params={"wait": 20, "seen": "queued"})

        waiting = pool.submit(wait)
        asked.wait()
        api.claim(job_id)
        answer = waiting.result(15)
    assert answer.json()["status"] == "running"


def test_a_wait_for_what_is_already_so_or_will_never_change_does_not_wait(api: Api) -> None:
    job_id = api.submit()["id"]
    assert api.http.get(f"/jobs/{job_id}", params={"wait": 20, "seen": "running"}).json()["status"] == "queued"
    api.http.post(f"/jobs/{job_id}/cancel")
    answer = api.http.get(f"/jobs/{job_id}", params={"wait": 20, "seen": "cancelled"})
    assert answer.json()["status"] == "cancelled"
    assert answer.elapsed < timedelta(seconds=10)


def test_a_wait_ends_when_its_time_is_over(api: Api) -> None:
    job_id = api.submit()["id"]
    answer = api.http.get(f"/jobs/{job_id}", params={"wait": 0.2, "seen": "queued"})
    assert answer.json()["status"] == "queued"
    assert answer.elapsed >= timedelta(seconds=0.2)


def test_a_wait_queries_the_queue_position_once(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id, other = api.submit()["id"], api.submit()["id"]
    places, looks = 0, threading.Semaphore(0)
    find_queue_position, get_job = queue_position.find_queue_position, reads.get_measured_job

    def counted_place(*arguments: Any) -> Any:
        nonlocal places
        places += 1
        return find_queue_position(*arguments)

    def counted_look(*arguments: Any) -> Any:
        looks.release()
        return get_job(*arguments)

    monkeypatch.setattr(queue_position, "find_queue_position", counted_place)
    monkeypatch.setattr(reads, "get_measured_job", counted_look)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(api.http.get, f"/jobs/{job_id}", params={"wait": 2, "seen": "queued"})
        for name in "abc":
            looks.acquire()
            relabel(api.db, other, {"name": name})
        assert waiting.result(15).json()["queue_position"] is not None
    assert places == 1


@pytest.mark.parametrize("params", [{"wait": "nan"}, {"wait": "inf"}, {"wait": -1}, {"wait": 1000}, {"seen": "x"}])
def test_a_bad_wait_is_refused(api: Api, params: dict[str, Any]) -> None:
    answer = api.http.get(f"/jobs/{api.submit()['id']}", params=params)
    assert (answer.status_code, code(answer)) == (422, "invalid_request")
