"""`nanomoe serve` and `nanomoe demo`: the commands that start API and worker."""

import json
import os
import sys
import tempfile
import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from threading import Event
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from service.cli import text
from service.cli.addresses import option_for, own_url, settings
from service.cli.jobs import INTERRUPTED, SUCCEEDED, introduce, show_generated, show_to_the_end
from service.cli.output import Json, print_json
from service.cli.processes import ChildFailed, Processes, signals_as_interrupts
from service.client import Client
from service.settings import sqlite_url

PARAGRAPH = "paragraph.pt.txt"
DEMO_FILE = "nanomoe-demo.html"
PROMPT_WORDS = 4
START_SECONDS = 90
"""Longest time until the demo's worker claims the job: the first import of torch from a slow disk is most of it."""


def serve(
    port: Annotated[int | None, typer.Option(help="TCP port, in place of NANOMOE_PORT; 0 takes a free one.")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in this desktop's browser.")] = False,
    as_json: Json = False,
) -> None:
    """Start API and worker; Ctrl-C stops both. Settings are NANOMOE_ variables, and .env."""
    chosen = settings()
    environment = {} if port is None else {"NANOMOE_PORT": str(port)}
    console = text.console()
    with signals_as_interrupts(), Processes(environment) as processes:
        try:
            url = processes.start_api()
            processes.start_worker()
            if as_json:
                print(json.dumps({"url": url, "data_dir": str(chosen.data_dir)}), flush=True)
            else:
                console.print(Text.assemble("nanomoe is at ", (url, "bold cyan"), f", its data in {chosen.data_dir}"))
                hint = f"try: {text.program()} submit FILE --watch{option_for(url)}; docs at {url}/docs"
                console.print(f"{hint}; Ctrl-C stops both", style=text.DIM, soft_wrap=True)
            if open_page and not (_has_desktop() and webbrowser.open(url)):
                text.console(stderr=True).print(f"there is no browser to open here: open {url} in one")
            with processes.watched():
                Event().wait()
        except KeyboardInterrupt:
            text.console(stderr=True).print("stopping API and worker (press Ctrl-C again to kill them)")
    text.console(stderr=True).print("stopped; interrupted jobs continue when it is started again")


def _has_desktop() -> bool:
    """Whether a browser would have a window; elsewhere one for terminals would take over this one."""
    return sys.platform != "linux" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")))


def demo(
    data_dir: Annotated[Path | None, typer.Option(help="Folder for the data, in place of a temporary one.")] = None,
    as_json: Json = False,
) -> None:
    """Train the bundled paragraph, show each quarter, generate from it, and stop API and worker again."""
    began = time.monotonic()
    console = text.console(stderr=as_json)
    try:
        with signals_as_interrupts(), _folder(data_dir) as data:
            code = _demo(data, (data_dir or Path()) / DEMO_FILE, as_json)
    except KeyboardInterrupt:
        console.print("interrupted; API and worker are stopped")
        raise typer.Exit(INTERRUPTED) from None
    if code == SUCCEEDED:
        took = text.duration(time.monotonic() - began)
        console.print(f"done in {took}; API and worker are stopped", style=text.DIM)
        console.print(
            f"with your own text: start {text.program()} serve and open {own_url()} in a browser", style=text.DIM
        )
    raise typer.Exit(code)


def _write_report(to: Path, html: str, console: Console) -> None:
    """Write what stays of the demo: nobody answers any more when it is read."""
    try:
        to.write_text(html, encoding="utf-8")
    except OSError as error:
        console.print(f"its curve and figures could not be written to {to}: {error.strerror}", style=text.DIM)
    else:
        console.print(f"its curve and figures: {to.absolute()}, which opens in any browser", style=text.DIM)


@contextmanager
def _folder(chosen: Path | None) -> Iterator[Path]:
    """The chosen folder, or a temporary one, which is removed at the end."""
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="nanomoe-demo-") as folder:
        yield Path(folder)


def _demo(data: Path, report: Path, as_json: bool) -> int:
    """Run the demo with its data in a folder, and write its figures to `report`; returns the exit code."""
    console = text.console(stderr=as_json)
    paragraph = files("nanomoe").joinpath("assets", PARAGRAPH).read_text(encoding="utf-8").strip()
    environment = {
        "NANOMOE_DATA_DIR": str(data),
        "NANOMOE_DATABASE_URL": sqlite_url(data / "nanomoe.db"),
        "NANOMOE_HOST": "127.0.0.1",
        "NANOMOE_PORT": "0",
    }
    with Processes(environment, logs=data) as processes:
        with console.status("starting API and worker"):
            url = processes.start_api()
            processes.start_worker()
        console.print(f"the service is at {url} while this runs, its data in {data}", style=text.DIM)
        with Client(url) as client, processes.watched():
            job = client.submit(paragraph, name="demo", tags={"example": "paragraph"})
            if not as_json:
                console.print()
                console.print(Text(text.visible(paragraph), "italic"))
                console.print()
                introduce(job.view)
            with console.status("waiting for the worker"):
                if job.refresh(wait=START_SECONDS, seen="queued").status == "queued":
                    log = processes.log_tail("worker")
                    raise ChildFailed(f"the worker has not claimed the job after {START_SECONDS} seconds\n{log}")
            code = show_to_the_end(job, as_json=as_json, n_lines=4)
            if code == SUCCEEDED:
                prompt = " ".join(paragraph.split()[:PROMPT_WORDS])
                with text.waiting("loading the checkpoints at 25 and 100 %", quiet=as_json):
                    answers = [job.generate(prompt, percent, temperature=0) for percent in (25, 100)]
                if as_json:
                    print_json(answers)
                else:
                    console.print()
                    for answer in answers:
                        show_generated(answer, f"the checkpoint at {answer.checkpoint} % continues")
                _write_report(report, client.compare_html(job.id, lang=text.language()), console)
            return code
