"""What the page costs a browser: bytes, time until it can be used, main-thread time, hovering over 1,000 jobs, memory.

`python docs/page_figures.py` starts an API and a worker in a temporary folder, trains two small jobs, opens the page in
Chromium, and prints each figure. `--minutes 60` also trains a small job for as long with a window on it and one on the
list of jobs, and prints every five minutes what these hold. `--url` measures a service that runs already.

Times depend on what else the machine does; `cpu` is the time that the main thread itself ran (Chromium's thread ticks),
which depends on that far less.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pictures import CHROMIUM
from playwright.sync_api import Browser, CDPSession, Page, Route, sync_playwright

from service.cli.bench.temporary_service import run_service
from service.cli.processes import signals_as_interrupts
from service.client import Client

SLOW_DOWN = 4
"""Times by which the processor is slowed down for the first view."""

REPEATS = 5
N_JOBS = 1_000
N_MOVES = 120
MINUTES_BETWEEN = 5
TEXT = "o rato roeu a roupa do rei de roma, e a rainha com raiva rasgou o resto"
SMALL = {"tokenizer": "bytes", "n_embd": 16, "n_layer": 1, "n_head": 1}
LONG_EPOCHS = 9_000_000

SHOWN = """(selector) => {
  const look = () => {
    if (!document.querySelector(selector)) return requestAnimationFrame(look);
    // After the frame in which it is painted.
    requestAnimationFrame(() => setTimeout(() => (window.shownAfter = performance.now())));
  };
  look();
}"""
"""Notes when an element was first painted, in milliseconds after the document was asked for."""

HOVER = """() => {
  window.delays = [];
  addEventListener("pointermove", () => {
    const began = performance.now();
    requestAnimationFrame(() => setTimeout(() => window.delays.push(performance.now() - began)));
  }, { capture: true });
}"""
"""Notes how long each move of the pointer takes until the frame after it is painted, in milliseconds."""


@contextmanager
def service() -> Iterator[str]:
    """The address of a service of its own with a worker."""
    with signals_as_interrupts(), run_service() as temporary:
        temporary.processes.start_worker()
        with temporary.processes.watched():
            yield temporary.url


def metrics(session: CDPSession) -> dict[str, float]:
    """Chromium's counters of a page; durations in seconds of the main thread's own time."""
    return {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}


@contextmanager
def window(browser: Browser, slow_down: int = 1) -> Iterator[tuple[Page, CDPSession]]:
    """A new window without a cache, whose main thread is measured."""
    with browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-US") as context:
        page = context.new_page()
        session = context.new_cdp_session(page)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})
        session.send("Emulation.setCPUThrottlingRate", {"rate": slow_down})
        yield page, session


def open_until(page: Page, session: CDPSession, url: str, selector: str) -> dict[str, float]:
    """Open an address until an element is painted: milliseconds until then, and of the main thread's own time."""
    page.add_init_script(f"({SHOWN})({json.dumps(selector)})")
    before = metrics(session)
    page.goto(url, wait_until="commit")
    page.wait_for_function("() => window.shownAfter !== undefined", timeout=120_000)
    after = metrics(session)
    took = {
        name: 1000 * (after[f"{name}Duration"] - before[f"{name}Duration"]) for name in ("Task", "Script", "Layout")
    }
    return {"shown": page.evaluate("window.shownAfter"), **took}


def print_figures(name: str, found: list[dict[str, float]]) -> None:
    middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
    cpu = f"cpu {middle['Task']:,.0f} ms (script {middle['Script']:,.0f}, layout {middle['Layout']:,.0f})"
    print(f"{name}: shown after {middle['shown']:,.0f} ms, {cpu}; median of {len(found)}", flush=True)


def measure_first_view(browser: Browser, url: str) -> None:
    """Bytes of the list of jobs, and when it can be used."""
    for slow_down in (1, SLOW_DOWN):
        found = []
        for _ in range(REPEATS):
            with window(browser, slow_down) as (page, session):
                found.append(open_until(page, session, f"{url}/page/jobs", "table.jobs tbody tr"))
                sizes = page.evaluate(
                    "performance.getEntriesByType('resource').concat(performance.getEntriesByType('navigation'))"
                    ".filter(one => /static|page/.test(one.name)).map(one => one.encodedBodySize)"
                )
        print_figures(f"first view, processor {slow_down} times as slow", found)
    print(f"first view: {sum(sizes):,} bytes compressed in {len(sizes)} files", flush=True)


def repeated(route: Route) -> None:
    """The answer of the service about its jobs, each of them said again under other ids until there are many."""
    answer: dict[str, Any] = route.fetch().json()
    jobs = answer["jobs"]
    answer["jobs"] = [
        {**one, "job_id": f"{one['job_id']}-{n}", **({"name": f"job {n}"} if "name" in one else {})}
        for n, one in ((n, jobs[n % len(jobs)]) for n in range(N_JOBS))
    ]
    if "groups" in answer:
        lrs = [1e-4 * (n + 1) for n in range(N_JOBS)]
        answer["parameters"] = [{"name": "lr", "values": lrs}]
        for one, lr in zip(answer["jobs"], lrs, strict=True):
            one["values"] = {"lr": lr}
        answer["groups"] = [
            {"values": one["values"], "job_ids": [one["job_id"]], "quarters": []} for one in answer["jobs"]
        ]
    route.fulfill(json=answer)


def measure_many(browser: Browser, url: str, job_ids: list[str]) -> None:
    """The page's own part of a comparison of 1,000 jobs: the service's answers are at hand at once."""
    address = f"{url}/page/compare?job=" + "&job=".join(job_ids)
    found = []
    for _ in range(REPEATS):
        with window(browser) as (page, session):
            page.route(re.compile(re.escape(url) + r"/compare(/series)?\?"), repeated)
            found.append(open_until(page, session, address, ".overlay .u-wrap canvas.over"))
            if len(found) == REPEATS:
                hover(page, session)
    print_figures(f"{N_JOBS:,} jobs, first curves", found)


def hover(page: Page, session: CDPSession) -> None:
    """Move the pointer over the curves."""
    page.wait_for_timeout(1000)
    box = page.locator(".overlay .u-over").bounding_box()
    assert box is not None
    page.evaluate(HOVER)
    before = metrics(session)
    for n in range(N_MOVES):
        left, top = box["x"] + (n + 0.5) / N_MOVES * box["width"], box["y"] + box["height"] * (0.2 + 0.6 * (n % 7) / 7)
        page.mouse.move(left, top)
        page.wait_for_function("n => window.delays.length > n", arg=n)
    delays = sorted(page.evaluate("window.delays"))
    cpu = 1000 * (metrics(session)["TaskDuration"] - before["TaskDuration"]) / N_MOVES
    print(
        f"{N_JOBS:,} jobs, hovering: next frame after {statistics.median(delays):.0f} ms (95 % within "
        f"{delays[int(0.95 * len(delays))]:.0f} ms), cpu {cpu:.1f} ms for each move",
        flush=True,
    )


def measure_memory(browser: Browser, url: str, minutes: float) -> None:
    """What two windows hold while a job trains: of JavaScript, of the document, and of buffers."""
    with Client(url) as client:
        job = client.submit(TEXT, SMALL | {"epochs": LONG_EPOCHS}, name="a long one")
        began = time.monotonic()
        with window(browser) as (of_job, job_session), window(browser) as (of_list, list_session):
            of_job.goto(f"{url}/page/jobs/{job.id}")
            of_list.goto(f"{url}/page/jobs")
            while True:
                passed = (time.monotonic() - began) / 60
                print(f"after {passed:.0f} min, step {client.job(job.id).view.progress.step:,}:", flush=True)
                for name, session in (("job", job_session), ("list", list_session)):
                    print(f"  {name}: {held(session)}", flush=True)
                if passed >= minutes:
                    break
                of_job.wait_for_timeout(60_000 * min(MINUTES_BETWEEN, minutes - passed + 0.01))
        job.cancel()


def held(session: CDPSession) -> str:
    """What a window holds once its garbage was collected."""
    for _ in range(2):
        session.send("HeapProfiler.collectGarbage")
    heap = session.send("Runtime.getHeapUsage")
    found = metrics(session)
    sizes = ", ".join(
        f"{name} {heap.get(key, 0) / 1e6:.2f} MB"
        for name, key in (
            ("JavaScript", "usedSize"),
            ("document", "embedderHeapUsedSize"),
            ("buffers", "backingStorageSize"),
        )
    )
    return f"{sizes}, {found['Nodes']:.0f} nodes, {found['JSEventListeners']:.0f} listeners"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="address of a service that runs already, without keys")
    parser.add_argument("--minutes", type=float, default=0, help="how long memory is watched; 0 is not at all")
    options = parser.parse_args()
    if options.url is None:
        with service() as url:
            measure(url, options.minutes)
    else:
        measure(options.url, options.minutes)


def measure(url: str, minutes: float) -> None:
    """Print every figure."""
    with Client(url) as client:
        jobs = [client.submit(TEXT, SMALL | {"epochs": 400, "seed": seed}, name=f"seed {seed}") for seed in (1, 2)]
        for job in jobs:
            assert job.wait().status == "succeeded", job.view
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        print(f"Chromium {browser.version}", flush=True)
        measure_first_view(browser, url)
        measure_many(browser, url, [job.id for job in jobs])
        if minutes:
            measure_memory(browser, url, minutes)


if __name__ == "__main__":
    main()
