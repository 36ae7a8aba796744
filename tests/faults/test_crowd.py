"""A short run of the crowd."""

from tests.faults.crowd import run


def test_a_crowd_gets_its_answers_and_leaves_no_slot_and_no_memory_behind() -> None:
    rounds = run(n_clients=16, rounds=3, seconds=2)
    for one in rounds:
        assert one.unexpected == {}
        assert one.answers["answered"] > 0
        assert one.answers["streamed"] > 0
        assert one.answers["left"] > 0
        assert one.answers["refused as it must be"] > 0
    first, last = rounds[0].resident, rounds[-1].resident
    for process in ("api", "engine"):
        assert last[process] < 1.05 * first[process], f"{process} grew from {first[process]} to {last[process]} bytes"
