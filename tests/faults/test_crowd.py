"""A short run of the crowd."""

import asyncio
import random

import httpx
import pytest

from tests.faults.crowd import Round, _leave, run


def test_a_crowd_of_clients_gets_its_answers_and_leaks_no_slot_and_no_memory() -> None:
    rounds = run(n_clients=16, rounds=3, seconds=2)
    for one in rounds:
        assert one.unexpected == {}
        assert one.answers["answered"] > 0
        assert one.answers["streamed"] > 0
        assert one.answers["left"] > 0
        assert one.answers["refused as it must be"] > 0
        assert one.steps_trained > 0
    first, last = rounds[0].resident, rounds[-1].resident
    for process in ("api", "engine"):
        assert last[process] < 1.05 * first[process], f"{process} grew from {first[process]} to {last[process]} bytes"


@pytest.mark.parametrize(("status", "seen"), [(429, "told to come back"), (500, "unexpected 500 a_code")])
def test_a_refusal_of_a_client_that_would_disconnect_is_counted(status: int, seen: str) -> None:
    code = "generation_queue_full" if status == 429 else "a_code"
    refusing = httpx.MockTransport(lambda _: httpx.Response(status, json={"code": code}, headers={"Retry-After": "1"}))

    async def leave_often() -> Round:
        found, chance = Round(), random.Random(0)  # noqa: S311
        async with httpx.AsyncClient(base_url="http://nanomoe.test", transport=refusing) as http:
            for _ in range(20):  # in both ways
                await _leave(http, found, {"prompt": "Era"}, chance)
        return found

    assert asyncio.run(leave_often()).answers == {seen: 20}
