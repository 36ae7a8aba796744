"""The API is killed while jobs arrive: whoever got no answer sends the same again, and every job is there once."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from sqlmodel import select

from service.database.database import Database
from service.jobs import reads
from service.jobs.tables import Job
from service.settings import Settings
from tests.api import serving
from tests.databases import EITHER
from tests.races import at_once

ROOT = Path(__file__).parents[2]
N_JOBS = 50

# The API, which dies in the middle of its 20th submission: as that is to be committed, or once it was.
_DYING = """
import itertools, os, signal, sys
import sqlalchemy as sa
from service.__main__ import main
from service.jobs import submit as submission

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def dying_submit(db, *arguments, **options):
    is_the_one = next(numbers) == 20
    if is_the_one and moment == "before the commit":
        sa.event.listen(db.engine, "commit", die)
    submitted = submit(db, *arguments, **options)
    if is_the_one:
        die()
    return submitted

moment = sys.argv.pop()
numbers, submit, submission.submit_job = itertools.count(1), submission.submit_job, dying_submit
main()
"""


@contextmanager
def _api(settings: Settings, *program: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of the API, and its address."""
    environment = {
        **os.environ,
        "NANOMOE_DATA_DIR": str(settings.data_dir),
        "NANOMOE_DATABASE_URL": settings.database_url,
        "NANOMOE_PORT": "0",
    }
    command = [sys.executable, *program]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as started:
        try:
            assert started.stdout is not None
            found = re.fullmatch(r"nanomoe listening on (\S+)\n", started.stdout.readline())
            assert found
            yield started, found[1]
        finally:
            started.kill()


def _submit_all(url: str) -> list[str | None]:
    """Submit all jobs at once, each with its key; their ids, None for what got no answer."""
    http = httpx.Client(
        base_url=url, timeout=30, limits=httpx.Limits(max_connections=N_JOBS, max_keepalive_connections=0)
    )

    def submitting(n: int) -> Callable[[], str | None]:
        body = {"text": f"O gato {n} dorme.", "config": {"tokenizer": "bytes"}}

        def submit() -> str | None:
            try:
                answer = http.post("/jobs", json=body, headers={"Idempotency-Key": f"key-{n}"})
            except httpx.TransportError:
                return None
            assert answer.status_code in (200, 201), answer.text
            job_id: str = answer.json()["id"]
            return job_id

        return submit

    with http:
        return at_once([submitting(n) for n in range(N_JOBS)])


@EITHER
@pytest.mark.parametrize("moment", ["before the commit", "after the commit"])
def test_an_api_that_is_killed_while_jobs_arrive_makes_each_once(db: Database, settings: Settings, moment: str) -> None:
    with _api(settings, "-c", _DYING, moment) as (api, url):
        first = _submit_all(url)
        assert api.wait(30) == -signal.SIGKILL
    answered = {job_id for job_id in first if job_id is not None}
    assert len(answered) < N_JOBS
    assert answered <= {job.id for job in reads.list_jobs(db, limit=N_JOBS)}, "what was answered is there"
    with serving(settings.model_copy(update={"port": 0})) as restarted:
        second = _submit_all(restarted.url)
        assert [old or new for old, new in zip(first, second, strict=True)] == second, "a key keeps its job"
    with db.read() as session:
        jobs = {key: job_id for job_id, key in session.exec(select(Job.id, Job.idempotency_key))}
    assert jobs == {f"key-{n}": job_id for n, job_id in enumerate(second)}
    assert reads.count_jobs(db)["queued"] == N_JOBS
