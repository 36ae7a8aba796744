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
    ],
)
def test_a_wrong_use_is_one_line(nanomoe: Run, arguments: list[str], said: str) -> None:
    done = nanomoe("workers", *arguments)
    assert (done.code, done.out) == (2, "")
    assert said in " ".join(done.err.replace("│", " ").split())
    assert "Traceback" not in done.err


def test_the_engine_that_is_not_installed_is_named(nanomoe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "service.engines.on_ray", raising=False)
    done = nanomoe("workers", "status", "--on", "ray")
    assert (done.code, done.out) == (2, "")
    assert "the engine ray is an extra: pip install 'nanomoe[ray]'" in done.err


def test_the_settings_are_checked_before_anything_is_started(nanomoe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOMOE_LEASE_SECONDS", "soon")
    assert "NANOMOE_LEASE_SECONDS" in nanomoe("workers", "up", "--on", "ray").err
