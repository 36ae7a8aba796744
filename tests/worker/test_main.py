"""`python -m worker`: flags and refusals."""

import subprocess
import sys
from pathlib import Path

import pytest

from worker.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _own_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` runs in this process, whose logging and hooks are pytest's."""
    monkeypatch.setattr("worker.__main__.configure_logging", lambda form: None)


def test_a_worker_for_a_missing_device_reports_it_and_exits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--devices", "tpu"]) == 2
    assert "'tpu'" in capsys.readouterr().err


def test_an_invalid_setting_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--lease-seconds", "3", "--heartbeat-seconds", "2"]) == 2
    assert "NANOMOE_HEARTBEAT_SECONDS: must be at most a third" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--slots", "0"], ["--slots", "two"], ["--no-such-flag"]])
def test_a_wrong_flag_is_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(flags)
    assert "usage" in capsys.readouterr().err


def test_the_supervisor_loads_no_torch() -> None:
    code = "import sys, worker.__main__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
