"""`nanomoe workers`: what is refused before an engine is asked. Fleets that run: `tests/service/engines`."""

import sys

import pytest

from tests.service.cli.conftest import Run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["up"], "Missing option '--on'"),
        (["up", "--on", "kubernetes"], "--on 'kubernetes' is none of ray"),
        (["up", "--on", "ray", "--count", "2", "--max", "3"], "--count is a fixed number of workers"),
        (["up", "--on", "ray", "--count", "2", "--min", "0"], "--count is a fixed number of workers"),
        (["up", "--on", "ray", "--min", "1"], "--min needs --max"),
        (["up", "--on", "ray", "--min", "4", "--max", "3"], "--min 4 is more than --max 3"),
        (["up", "--on", "ray", "--name", "Many_0"], "--name 'Many_0' must be of small letters, digits and `-`"),
        (["status", "--on", "ray", "--address", "127.0.0.1:1"], "cluster_unreachable: no Ray cluster at 127.0.0.1:1"),
        (["status", "--on", "ray", "--address", "nowhere"], "an address is HOST:PORT or auto"),
        (["down", "--on", "ray", "--address", "127.0.0.1:1"], "cluster_unreachable"),
        (["up", "--on", "ray", "--slurm", "partition=gpu"], "--slurm is for --on slurm"),
        (["up", "--on", "slurm", "--address", "127.0.0.1:1"], "--address is for --on ray"),
        (["up", "--on", "slurm", "--min", "0", "--max", "3"], "on Slurm nothing follows the queue. Give --count"),
        (["up", "--on", "slurm", "--slurm", "=gpu"], "slurm_option_invalid: '=gpu' is not KEY=VALUE"),
        (["up", "--on", "slurm", "--slurm", "nodes=2"], "'nodes' follows from --count"),
        (["up", "--on", "slurm", "--slurm", "time=4:00"], "time is in minutes, 10 or more: not '4:00'"),
        (["up", "--on", "slurm", "--slurm", "time=9"], "time is in minutes, 10 or more: not '9'"),
        (["down", "--on", "slurm"], "slurm_not_found: sbatch is not on PATH"),
    ],
)
def test_a_wrong_use_is_one_line(
    nanomoe: Run, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")  # a machine without Slurm
    done = nanomoe("workers", *arguments)
    assert (done.code, done.out) == (2, "")
    assert said in " ".join(done.err.replace("│", " ").split())
    assert "Traceback" not in done.err


@pytest.mark.parametrize(("engine", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_the_engine_that_is_not_installed_is_named(
    nanomoe: Run, engine: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for module in (f"on_{engine}", "slurm_task"):
        monkeypatch.delitem(sys.modules, f"service.engines.{module}", raising=False)
    done = nanomoe("workers", "status", "--on", engine)
    assert (done.code, done.out) == (2, "")
    assert f"the engine {engine} is an extra: pip install 'nanomoe[{engine}]'" in done.err


def test_the_settings_are_checked_before_anything_is_started(nanomoe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOMOE_LEASE_SECONDS", "soon")
    assert "NANOMOE_LEASE_SECONDS" in nanomoe("workers", "up", "--on", "ray").err
