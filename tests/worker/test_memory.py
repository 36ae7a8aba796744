"""Out-of-memory kills, told apart from any other SIGKILL."""

from pathlib import Path

from worker.memory import oom_kills


def test_kills_are_read_from_the_first_source_there_is(tmp_path: Path) -> None:
    cgroup, machine = tmp_path / "memory.events", tmp_path / "vmstat"
    machine.write_text("pgfault 1\noom_kill 7\nnuma_hit 3\n")
    assert oom_kills(cgroup, machine) == 7
    cgroup.write_text("low 0\noom 4\noom_kill 2\noom_group_kill 1\n")
    assert oom_kills(cgroup, machine) == 2


def test_where_nothing_is_counted_nothing_was_killed(tmp_path: Path) -> None:
    assert oom_kills(tmp_path / "nothing") == 0
