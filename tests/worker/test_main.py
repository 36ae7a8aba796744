"""`python -m worker`: flags and refusals."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.worker.workplace import ended_within, is_alive
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


@pytest.mark.parametrize(
    "flags",
    [["--slots", "0"], ["--slots", "two"], ["--idle-seconds", "0"], ["--idle-seconds", "nan"], ["--no-such-flag"]],
)
def test_a_wrong_flag_is_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(flags)
    assert "usage" in capsys.readouterr().err


def test_the_supervisor_loads_no_torch() -> None:
    code = "import sys, worker.__main__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_worker_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """It waits for a database that nobody makes: no trainer has to load for this."""
    code = (
        "import subprocess, sys, os\n"
        "worker = [sys.executable, '-m', 'worker', '--data-dir', sys.argv[1], '--parent', str(os.getpid())]\n"
        "print(subprocess.Popen(worker, stderr=open(sys.argv[1] + '/log', 'w')).pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        worker = psutil.Process(int(starter.stdout.readline()))
        give_up = time.monotonic() + 120
        while "waiting_for_database" not in (tmp_path / "log").read_text():
            assert time.monotonic() < give_up
            time.sleep(0.05)
        assert is_alive(worker.pid)
        starter.kill()
        assert ended_within(60, worker)
