"""Threads that do one thing together."""

import threading

import pytest
import torch

from nanomoe.training.steps.team import Team


def waiting(team: Team, thread: int) -> int:
    team.wait(thread)
    return thread


def test_every_thread_has_its_share_and_sees_what_the_others_did_before_they_waited() -> None:
    team, n = Team(3), 10
    done = torch.zeros(n)

    def program(thread: int) -> float:
        done[team.share(n, thread)] += 1
        team.wait(thread)
        return done.sum().item()

    assert team.run(program) == [n] * 3
    assert [team.share(n, thread) for thread in range(3)] == [slice(0, 3), slice(3, 6), slice(6, 10)]


def test_a_product_takes_one_thread_within_a_team_and_as_many_as_before_after_it() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert Team(2).run(lambda _: torch.get_num_threads()) == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("failing", [0, 2])
def test_an_error_in_one_thread_is_raised_and_keeps_no_other_waiting(failing: int) -> None:
    team = Team(3)

    def program(thread: int) -> str | None:
        if thread == failing:
            raise MemoryError(thread)
        team.wait(thread)
        return threading.current_thread().name

    with pytest.raises(MemoryError, match=str(failing)):
        team.run(program)
    assert team.run(lambda thread: waiting(team, thread)) == [0, 1, 2]


def test_more_threads_than_cores_can_wait_for_each_other() -> None:
    team = Team(40)
    assert team.run(lambda thread: waiting(team, thread)) == list(range(40))
