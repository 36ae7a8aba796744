"""The pictures of the README, taken of the page in Chromium while it shows two jobs that were really trained.

`make pictures` starts an API and a worker in a temporary folder, trains the example text as a dense model and as a
mixture of experts, and writes docs/pictures/. `--url` takes them of a service that runs already and has both jobs.
"""

import argparse
import base64
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from playwright.sync_api import Browser, Locator, Page, sync_playwright

from service.cli.processes import Processes, signals_as_interrupts
from service.cli.serve import PARAGRAPH
from service.client import Client, JobHandle
from service.settings import sqlite_url

PICTURES = Path(__file__).parent / "pictures"
WIDTH = 1000
"""Width of the window in CSS pixels: little more than GitHub gives a picture, so that its words stay legible."""

DENSITY = 2
"""Pixels of a picture for each CSS pixel."""

QUALITY = 80
"""Quality of the WebP files, 0 to 100."""

MOST_BYTES = 200_000
MARGIN = 12
"""CSS pixels around what is shown."""

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""An installed Chromium; without one playwright's own is taken."""

Theme = Literal["light", "dark"]


@dataclass(frozen=True)
class Picture:
    """A part of the view of a job."""

    job_name: str
    config: Mapping[str, Any]
    first: str
    """Selector of the element at its top."""

    last: str
    """Selector of the element at its bottom."""


SHOWN = {
    "job": Picture("one paragraph", {}, "section:has(> .charts)", "section:has(> .quarters)"),
    "mixture": Picture("a mixture of experts", {"use_moe": True}, "section:has(> .mixture)", ".mixture"),
}
"""Every picture, by the name of its file."""


@contextmanager
def trained() -> Iterator[str]:
    """The address of a service of its own, once it has trained the jobs."""
    with tempfile.TemporaryDirectory(prefix="nanomoe-pictures-") as folder:
        environment = {
            "NANOMOE_DATA_DIR": folder,
            "NANOMOE_DATABASE_URL": sqlite_url(Path(folder) / "nanomoe.db"),
            "NANOMOE_HOST": "127.0.0.1",
            "NANOMOE_PORT": "0",
        }
        text = files("nanomoe").joinpath("assets", PARAGRAPH).read_text("utf-8").strip()
        with signals_as_interrupts(), Processes(environment, logs=Path(folder)) as processes:
            url = processes.start_api()
            processes.start_worker()
            with Client(url) as client, processes.watched():
                jobs = [client.submit(text, dict(one.config), name=one.job_name) for one in SHOWN.values()]
                for job in jobs:
                    print(f"training {job.name} ...")
                    assert job.wait().status == "succeeded", job.view
                yield url


def newest(client: Client, name: str) -> JobHandle:
    """The newest job of that name that has succeeded."""
    return client.job(next(job.id for job in client.list_jobs(status="succeeded", limit=200).data if job.name == name))


def take(page: Page, picture: Picture) -> bytes:
    """The part of what the page shows, as WebP."""
    left, top, right, _ = _edges(page.locator(picture.first))
    *_, bottom = _edges(page.locator(picture.last))
    clip = {
        "x": left - MARGIN,
        "y": top - MARGIN,
        "width": right - left + 2 * MARGIN,
        "height": bottom - top + 2 * MARGIN,
        "scale": 1,
    }
    session = page.context.new_cdp_session(page)
    options = {"format": "webp", "quality": QUALITY, "clip": clip, "captureBeyondViewport": True}
    return base64.b64decode(session.send("Page.captureScreenshot", options)["data"])


def _edges(of: Locator) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of an element."""
    box = of.bounding_box()
    assert box is not None, "it is not shown"
    return box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]


def pictures(browser: Browser, url: str, theme: Theme) -> Iterator[tuple[str, bytes]]:
    """Names of files and pictures in light or dark."""
    with Client(url) as client:
        jobs = {name: newest(client, picture.job_name) for name, picture in SHOWN.items()}
    with browser.new_context(
        viewport={"width": WIDTH, "height": 900},
        device_scale_factor=DENSITY,
        color_scheme=theme,
        locale="en-US",
        reduced_motion="reduce",
    ) as context:
        page = context.new_page()
        for name, picture in SHOWN.items():
            page.goto(f"{url}/page/jobs/{jobs[name].id}")
            page.locator(f"{picture.last} .tokens").last.wait_for()
            page.wait_for_load_state("networkidle")
            yield f"{name}-{theme}.webp", take(page, picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="address of a service that has both jobs, by their names")
    options = parser.parse_args()
    if options.url is None:
        with trained() as url:
            write(url)
    else:
        write(options.url)


def write(url: str) -> None:
    """Take every picture of a service's page."""
    PICTURES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for theme in ("light", "dark"):
            for name, content in pictures(browser, url, theme):
                assert len(content) < MOST_BYTES, f"{name} has {len(content):,} bytes"
                (PICTURES / name).write_bytes(content)
                print(f"{name}: {len(content):,} bytes")


if __name__ == "__main__":
    main()
