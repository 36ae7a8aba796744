"""What the processes write to standard error, each run as itself or configured as that."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from service.generation.messages import EngineStart, to_line

ROOT = Path(__file__).parents[2]

_LOG_FAULTS = """
import logging, sys, threading, warnings
import structlog
from nanomoe.logs import configure_logging

configure_logging(sys.argv[1])
try:
    raise ValueError("a fault of ours")
except ValueError:
    structlog.get_logger("ours").exception("it_failed", slot=1)
    logging.getLogger("uvicorn.error").exception("library %s", "line")
logging.getLogger("uvicorn.error").info("too much")
logging.getLogger("service.app").info("one of ours")
warnings.warn("a doubt")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
raise KeyError("nobody caught it")
"""


def _log_faults(form: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _LOG_FAULTS, form], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    return done.stderr


def test_every_json_line_carries_its_traceback_as_text() -> None:
    ours, library, info, warning, in_thread, uncaught = (json.loads(line) for line in _log_faults("json").splitlines())
    assert (ours["event"], ours["level"], ours["logger"], ours["slot"]) == ("it_failed", "error", "ours", 1)
    assert (library["event"], library["logger"]) == ("library line", "uvicorn.error")
    assert (info["event"], info["level"]) == ("one of ours", "info")
    assert "a doubt" in warning["event"]
    for line, error in ((ours, "ValueError"), (library, "ValueError"), (in_thread, "ZeroDivisionError"),
                        (uncaught, "KeyError")):  # fmt: skip
        assert line["exception"].startswith("Traceback (most recent call last):\n")
        assert error in line["exception"]
        assert "exc_info" not in line
    assert all(line["timestamp"].endswith("Z") for line in (ours, library, info, warning, in_thread, uncaught))


def test_on_a_console_a_traceback_is_read_as_python_prints_it() -> None:
    text = _log_faults("console")
    assert text.count("Traceback (most recent call last):\n") == 4
    assert "ValueError: a fault of ours" in text
    assert "too much" not in text


def _last_line(command: list[str], sent: bytes, **environment: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | environment, input=sent, capture_output=True, check=False
    )
    assert done.returncode != 0
    line: dict[str, str] = json.loads(done.stderr.splitlines()[-1])
    return line


def test_the_generation_engine_logs_in_the_form_of_its_start_message() -> None:
    start = EngineStart(parent=os.getpid(), device="cpu", cache_bytes=1, max_running=1, log_format="json")
    line = _last_line(["-m", "service.generation.engine"], to_line(start) + b"no request\n")
    assert line["event"] == "request_invalid"
    assert "ValidationError" in line["exception"]


_FAULT_IN_THE_WORKER = """
import sys
from worker import __main__
from worker.supervisor import Supervisor

def fault(supervisor):
    raise ValueError("a fault of ours")

Supervisor.run = fault
sys.exit(__main__.main([]))
"""


def test_a_worker_that_dies_of_a_fault_says_so_in_json(migrated_sqlite: Path, tmp_path: Path) -> None:
    line = _last_line(
        ["-c", _FAULT_IN_THE_WORKER], b"", NANOMOE_LOG_FORMAT="json", NANOMOE_DEVICE="cpu",
        NANOMOE_DATA_DIR=str(tmp_path), NANOMOE_DATABASE_URL=f"sqlite:///{migrated_sqlite}",
    )  # fmt: skip
    assert (line["event"], line["level"]) == ("uncaught_exception", "critical")
    assert "ValueError: a fault of ours" in line["exception"]


_FAULT_IN_A_TRAINER = """
import os, sys, time
from worker import trainer

def fault(**_):
    raise ValueError("a fault of ours")

trainer._warm_up = fault
until = str(time.monotonic() + 60)
sys.argv = ["trainer", "--parent", str(os.getppid()), "--until", until, "--log-format", "json"]
trainer.main()
"""


def test_a_trainer_that_ends_by_a_fault_logs_it_in_json() -> None:
    ours, its_stdin = socket.socketpair()  # open until it has ended: the end of its stdin would end it
    with (
        ours,
        its_stdin,
        subprocess.Popen(
            [sys.executable, "-c", _FAULT_IN_A_TRAINER], cwd=ROOT, stdin=its_stdin.fileno(), stderr=subprocess.PIPE
        ) as trainer,
    ):
        assert trainer.stderr is not None
        (line,) = trainer.stderr.read().splitlines()
    assert trainer.returncode == 1
    logged = json.loads(line)
    assert (logged["event"], logged["level"]) == ("uncaught_exception", "critical")
    assert "ValueError: a fault of ours" in logged["exception"]
