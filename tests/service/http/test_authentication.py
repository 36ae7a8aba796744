"""Failed attempts are slowed down, in bounded memory; keys never come into a log."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from service.database.opening import open_database
from service.errors import Unauthorized
from service.http import authentication
from service.http.authentication import FREE_FAILURES, LONGEST_DELAY_SECONDS, MAX_ADDRESSES, MAX_PENDING, SlowDown
from service.settings import Settings
from tests.service.test_app import ROOT, process


class Slept:
    """A clock that stands still, and the seconds that were to be slept."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.seconds: list[float] = []
        self.slow_down = SlowDown(clock=lambda: self.now, sleep=self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.now += seconds

    async def fail(self, n: int, address: str = "192.0.2.1") -> None:
        for _ in range(n):
            await self.slow_down.failed(address, "wrong")


def test_the_first_failures_are_answered_at_once_and_further_ones_ever_later() -> None:
    slept = Slept()
    asyncio.run(slept.fail(FREE_FAILURES))
    assert slept.seconds == []
    asyncio.run(slept.fail(8))
    assert slept.seconds == [0.25, 0.5, 1, 2, 4, 8, 8, 8]
    asyncio.run(slept.fail(FREE_FAILURES, "192.0.2.2"))
    assert len(slept.seconds) == 8


def test_an_address_that_has_not_failed_for_long_begins_anew() -> None:
    slept = Slept()
    asyncio.run(slept.fail(FREE_FAILURES + 1))
    slept.now += authentication.FORGET_SECONDS + 1
    asyncio.run(slept.fail(FREE_FAILURES))
    assert slept.seconds == [0.25]


def test_attempts_at_once_are_answered_one_after_another_and_more_are_not_looked_at() -> None:
    async def flood() -> list[float]:
        waits: list[float] = []
        all_wait, go = asyncio.Event(), asyncio.Event()

        async def sleep(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == MAX_PENDING:
                all_wait.set()
            await go.wait()

        slow_down = SlowDown(clock=lambda: 0.0, sleep=sleep)
        slow_down.succeeded("of a neighbour")
        attempts = [slow_down.failed("192.0.2.1", "wrong") for _ in range(FREE_FAILURES + MAX_PENDING)]
        failing = [asyncio.create_task(attempt) for attempt in attempts]
        await all_wait.wait()
        with pytest.raises(Unauthorized) as refused:
            slow_down.check("192.0.2.1", "new")
        assert refused.value.code == "too_many_attempts"
        assert refused.value.retry_after == waits[-1]
        slow_down.check("192.0.2.2", "new")
        slow_down.check("192.0.2.1", "of a neighbour")
        go.set()
        await asyncio.gather(*failing)
        slow_down.check("192.0.2.1", "new")
        return waits

    waits = asyncio.run(flood())
    assert waits[:4] == [0.25, 0.75, 1.75, 3.75]
    assert waits[-1] - waits[-2] == LONGEST_DELAY_SECONDS


def test_the_addresses_of_one_ipv6_network_are_one_and_memory_is_bounded() -> None:
    slept = Slept()
    for number in range(FREE_FAILURES + 1):
        asyncio.run(slept.fail(1, f"2001:db8::{number:x}"))
    assert slept.seconds == [0.25]
    assert len(slept.slow_down) == 1
    for number in range(2 * MAX_ADDRESSES):
        asyncio.run(slept.fail(1, f"2001:db8:{number:x}::1"))
    assert len(slept.slow_down) == MAX_ADDRESSES


def test_a_key_that_was_valid_and_is_revoked_is_a_wrong_one_and_memory_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(authentication, "MAX_KNOWN_KEYS", 2)
    slept = Slept()
    for key in ("first", "second", "first", "third"):
        slept.slow_down.succeeded(key)
    asyncio.run(slept.slow_down.failed("192.0.2.1", "third"))
    known = [key for key in ("first", "second", "third") if slept.slow_down.knows(key)]
    assert known == ["first"]


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_no_key_and_no_session_token_ever_comes_into_a_log(tmp_path: Path, log_format: str) -> None:
    made = subprocess.run(
        [sys.executable, "-c", "from service.cli import main; main()", "keys", "create", "ana", "--json"],
        cwd=ROOT, env={**os.environ, "NANOMOE_DATA_DIR": str(tmp_path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    key, wrong = json.loads(made.stdout)["key"], "nmk_" + "w" * 43
    with process(tmp_path, NANOMOE_LOG_FORMAT=log_format) as (started, url):
        with httpx.Client(base_url=url) as http:
            for one in (key, wrong):
                http.get("/jobs", headers={"Authorization": f"Bearer {one}"})
                http.get("/workers", headers={"Authorization": f"Bearer {one}"})
                http.get("/jobs", headers={"Authorization": f"Basic {one}"})
                http.get(f"/jobs/{one}", params={"key": one}, headers={"Authorization": f"Bearer {key}"})
                http.post("/session", content=f'{{"key": "{one}"', headers={"Content-Type": "application/json"})
                http.post("/session", json={"key": one, "more": one})
                http.post("/session", json={"key": one})
            token = http.cookies["nanomoe_session"]
            database = open_database(Settings(_env_file=None, data_dir=tmp_path))
            with database.write() as session:  # an unexpected error while a key is there, with its traceback
                session.connection().exec_driver_sql("DROP TABLE sign_ins")
            database.close()
        # On connections of their own: after an unexpected error the server closes them.
        broken = httpx.get(f"{url}/jobs", headers={"Cookie": f"nanomoe_session={token}"})
        broken_sign_in = httpx.post(f"{url}/session", json={"key": key})
        started.send_signal(signal.SIGTERM)
        out, err = started.communicate(timeout=30)
    assert broken.status_code >= 500
    assert broken_sign_in.status_code >= 500
    assert "sign_ins" in err, "the errors were logged"
    for secret in (key, wrong, token):
        assert secret not in out + err + broken.text + broken_sign_in.text
