"""A real browser in front of a real API and a real training worker, each a process that can be stopped and started.

`browser_page` fails a test on a console error, on a request to anywhere but the service, and on a serious finding of
axe-core in the view that the test ends with; a test may check others with `axe`.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

from service.access.keys import PREFIX

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
AXE = (Path(__file__).parents[2] / "vendor/axe-core/axe.min.js").read_text("utf-8")
START_SECONDS = 120
PHONE = {"width": 390, "height": 844}
STICKS_OUT = """() => {
  const width = document.documentElement.clientWidth;
  const around = (element) => {
    const { position } = getComputedStyle(element);
    return position === "fixed" ? null : position === "absolute" ? element.offsetParent : element.parentElement;
  };
  const isClipped = (element) => {
    for (let at = around(element); at && at !== document.body; at = around(at)) {
      if (getComputedStyle(at).overflowX !== "visible") return true;
    }
    return false;
  };
  return Array.from(document.querySelectorAll("body *"))
    .map((element) => {
      const { left, right } = element.getBoundingClientRect();
      const isOpen = getComputedStyle(element).overflowX === "visible";
      return [element, left, Math.max(right, isOpen ? left + element.scrollWidth : 0)]; // words may reach beyond a box
    })
    .filter(([element, left, right]) => right > left && right > width + 0.5 && !isClipped(element))
    .map(([element, left, right]) => {
      const name = `${element.localName}.${element.getAttribute("class") ?? ""}`;
      return `${name} ${Math.round(left)} to ${Math.round(right)}: ${element.textContent.trim().slice(0, 60)}`;
    });
}"""
"""The elements that reach beyond the window's right edge, but for what a scrolling element around them cuts off; that
is not an absolutely positioned one whose containing block is farther out."""

WAIT_MS = 60_000
"""Longest that a test waits for something to show: a machine that runs other tests beside may stall."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class Site:
    """The service as its users run it: `python -m service` and `python -m worker` over one data folder."""

    def __init__(self, folder: Path) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        self._environment = os.environ | {
            "NANOMOE_DATA_DIR": str(folder / "data"),
            "NANOMOE_PORT": str(self.port),
            "NANOMOE_DEVICE": "cpu",
        }
        self._log = (folder / "log").open("ab")
        self._api: subprocess.Popen[bytes] | None = None
        self._worker: subprocess.Popen[bytes] | None = None

    def start_api(self) -> None:
        """Returns once the API answers."""
        self._api = self._start("service")
        give_up = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self._api.poll() is None, "the API has ended"
            assert time.monotonic() < give_up, "the API does not answer"
            time.sleep(0.05)

    def stop_api(self) -> None:
        assert self._api is not None
        self._api.send_signal(signal.SIGTERM)
        self._api.wait(30)

    def start_worker(self) -> None:
        self._worker = self._start("worker")

    def close(self) -> None:
        self.http.close()
        for process in (self._worker, self._api):
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait(60)
        self._log.close()

    def create_key(self, owner: str, role: str) -> str:
        """A new key, made on the command line as whoever runs the service does."""
        command = [
            sys.executable,
            "-c",
            "from service.cli import main; main()",
            "keys",
            "create",
            owner,
            "--role",
            role,
        ]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=True)
        return next(word for word in done.stdout.split() if word.startswith(PREFIX))

    def submit(self, **job: Any) -> str:
        """The id of a job that was submitted over HTTP."""
        answer = self.http.post("/jobs", json=job)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def wait_for(self, job_id: str, seconds: float = 120) -> dict[str, Any]:
        """The job once it has ended."""
        give_up = time.monotonic() + seconds
        while True:
            job: dict[str, Any] = self.http.get(f"/jobs/{job_id}", params={"wait": 20}).json()
            if job["finished_at"] is not None:
                return job
            assert time.monotonic() < give_up, job

    def _start(self, module: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-m", module], env=self._environment, stdout=self._log, stderr=self._log
        )

    def _answers(self) -> bool:
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False


class Guarded:
    """A browser's page, and everything that was wrong with it."""

    def __init__(self, page: Page, site: Site) -> None:
        self.page = page
        self.site = site
        self.faults: list[str] = []
        self._is_down = False
        self._expected: tuple[int, ...] = ()
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.faults.append(f"uncaught: {error}"))
        page.on("request", self._request)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type not in ("error", "warning"):
            return
        # Chromium reports every answer of 400 and more as an error: a form is validated by such answers.
        address = str(message.location.get("url", ""))
        is_validation = "422" in message.text and "dry_run=true" in address
        is_expected = any(f"status of {status} " in message.text for status in self._expected)
        if not is_validation and not is_expected and not (self._is_down and "Failed to load resource" in message.text):
            self.faults.append(f"console {message.type}: {message.text} ({address})")

    def _request(self, request: Request) -> None:
        if urlsplit(request.url).netloc != urlsplit(self.site.url).netloc and not request.url.startswith(
            ("data:", "blob:")
        ):
            self.faults.append(f"a request to {request.url}")

    @contextmanager
    def outage(self) -> Iterator[None]:
        """The API is stopped meanwhile, and requests may fail."""
        self._is_down = True
        self.site.stop_api()
        try:
            yield
        finally:
            self.site.start_api()

    def outage_is_over(self) -> None:
        """From here on a request that fails is a fault again."""
        self._is_down = False

    def answers_may_be(self, *statuses: int) -> None:
        """From here on answers with these statuses are no faults."""
        self._expected = statuses

    def open(self, path: str) -> Page:
        self.page.goto(f"{self.site.url}{path}")
        return self.page

    def fits(self, width: int) -> None:
        """Fail, and name what sticks out, where the document is wider than `width` CSS pixels."""
        wide, elements = self.page.evaluate(f"[document.documentElement.scrollWidth, ({STICKS_OUT})()]")
        assert wide <= width, f"{self.page.url} is {wide} wide:\n" + "\n".join(elements)

    def axe(self) -> None:
        """Note the serious findings of axe-core in what is shown now."""
        self.page.evaluate(AXE)
        found = self.page.evaluate("axe.run({resultTypes: ['violations']})")
        for violation in found["violations"]:
            if violation["impact"] in ("serious", "critical"):
                places = "; ".join(node["html"][:160] + " " + node["failureSummary"] for node in violation["nodes"][:3])
                self.faults.append(f"axe {violation['id']} at {self.page.url}: {violation['help']}: {places}")


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The service with one worker."""
    running = Site(tmp_path_factory.mktemp("site"))
    try:
        running.start_api()
        running.start_worker()
        yield running
    finally:
        running.close()


# No longer than a module: while it is there, an event loop counts as running in this thread, and no other may.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium without a window."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@pytest.fixture
def browser_page(browser: Browser, site: Site) -> Iterator[Guarded]:
    """A new window of 1280 by 900 pixels, in English."""
    with browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-US") as context:
        guarded = Guarded(context.new_page(), site)
        guarded.page.set_default_timeout(WAIT_MS)
        yield guarded
        guarded.axe()
        assert guarded.faults == []
