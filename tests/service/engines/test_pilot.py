"""The pilot: real processes in a worker's place, and the real one where it refuses to start."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.engines.pilot import Pilot

WAITING = """
import os, signal, sys, time
def note(number, frame): open(sys.argv[1], 'a').write(signal.Signals(number).name + ' ')
signal.signal(signal.SIGTERM, note), signal.signal(signal.SIGINT, note)
print('to its starter', flush=True)
open(sys.argv[1], 'a').write('began ')
while not os.path.exists(sys.argv[1] + '.end') and open(sys.argv[1]).read().count('SIG') < int(sys.argv[2]):
    time.sleep(0.01)
"""
"""Notes each start and each signal in a file, and ends with the `N`th signal, or once there is another file."""


class Piloted:
    """A pilot in a thread, and the notes of what it runs."""

    def __init__(self, code: str, folder: Path, *arguments: str) -> None:
        self.notes = folder / "notes"
        self.notes.touch()
        command = [sys.executable, "-c", code]
        self.pilot = Pilot("many-0", [str(self.notes), *arguments], {}, command=command)
        self.thread = threading.Thread(target=self.pilot.run)
        self.thread.start()

    def wait_until(self, holds: Callable[[], bool]) -> None:
        give_up = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < give_up, (self.pilot.report(), self.notes.read_text())
            time.sleep(0.01)

    def ended(self) -> str:
        self.thread.join(60)
        assert not self.thread.is_alive()
        return self.notes.read_text()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Piloted]]:
    started: list[Piloted] = []

    def start(code: str, *arguments: str) -> Piloted:
        started.append(Piloted(code, tmp_path, *arguments))
        return started[-1]

    yield start
    for one in started:
        (tmp_path / "notes.end").touch()
        one.pilot.stop(now=True)
        one.ended()


def test_it_drains_the_worker_with_one_signal(run: Callable[..., Piloted]) -> None:
    piloted = run(WAITING, "1")
    piloted.wait_until(lambda: "began" in piloted.notes.read_text())
    report = piloted.pilot.report()
    assert (report.state, report.reason) == ("running", None)
    assert report.pid is not None
    piloted.pilot.stop()
    piloted.pilot.stop()
    assert piloted.ended() == "began SIGTERM "
    assert piloted.pilot.report().state == "ended"


def test_it_ends_the_worker_at_once_with_a_second_signal(run: Callable[..., Piloted]) -> None:
    piloted = run(WAITING, "2")
    piloted.wait_until(lambda: "began" in piloted.notes.read_text())
    piloted.pilot.stop()
    piloted.wait_until(lambda: "SIGTERM" in piloted.notes.read_text())
    assert piloted.pilot.report().state == "draining"
    piloted.pilot.stop(now=True)
    assert piloted.ended() == "began SIGTERM SIGINT "


def test_a_worker_that_crashed_is_started_again(run: Callable[..., Piloted]) -> None:
    piloted = run(WAITING, "9")
    piloted.wait_until(lambda: "began" in piloted.notes.read_text())
    pid = piloted.pilot.report().pid
    assert pid is not None
    os.kill(pid, 9)
    piloted.wait_until(lambda: piloted.notes.read_text().count("began") == 2)
    report = piloted.pilot.report()
    assert (report.state, report.restarts) == ("running", 1)
    assert report.pid != pid


def test_one_that_is_stopped_in_a_pause_starts_nothing(run: Callable[..., Piloted]) -> None:
    piloted = run("open(__import__('sys').argv[1], 'a').write('began '); raise SystemExit(1)")
    piloted.wait_until(lambda: piloted.pilot.report().state == "pausing")
    reason = piloted.pilot.report().reason
    piloted.pilot.stop()
    notes = piloted.ended()
    assert reason is not None
    assert reason.startswith("exited with status 1; started again in ")
    assert set(notes.split()) == {"began"}
    assert piloted.pilot.report().state == "ended"


def test_a_worker_that_ended_by_itself_stays_so(run: Callable[..., Piloted]) -> None:
    piloted = run("open(__import__('sys').argv[1], 'a').write('began ')")
    assert piloted.ended() == "began "
    assert piloted.pilot.report().state == "ended"


def test_a_worker_that_refuses_to_start_says_why_and_is_not_tried_again() -> None:
    report = Pilot("many-0", [], {"NANOMOE_DEVICE": "tpu"}).run()
    assert report.state == "refused"
    assert report.reason == "device 'tpu' is none of auto, cpu, cpu:N, cuda, cuda:N"
    assert report.restarts == 0
