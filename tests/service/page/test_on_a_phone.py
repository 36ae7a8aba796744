"""Every view at the width of a phone, with what a list may hold: long names, long tags, checkpoints as values."""

from dataclasses import dataclass

import pytest
from playwright.sync_api import Browser, expect

from tests.service.page.conftest import PHONE, Guarded, Site

WAIT_MS = 90_000
"""Longest time until a view shows its last part; the first generation waits for the engine's start."""

SMALL = {"tokenizer": "bytes", "n_embd": 16, "n_layer": 2, "n_head": 2, "epochs": 8}
TEXT = "o rato roeu a roupa do rei de roma, e a rainha com raiva rasgou o resto"
UNBROKEN = "a_name_without_a_single_space_that_is_longer_than_any_line_of_a_telephone_can_be"

WIDEN = """() => {
  const sheet = new CSSStyleSheet();
  sheet.replaceSync("* { letter-spacing: 0.08em !important; }");
  document.adoptedStyleSheets = [sheet];
}"""
"""Widens every line by about what a wide fallback font adds where the usual ones are not installed."""

GENERATE = "/page/generate?checkpoint={mixture}@25&checkpoint={grown}@100&prompt=o%20rato&run=1"


@dataclass(frozen=True)
class Shown:
    """Ids of what the views show."""

    mixture: str
    grown: str
    sweep: str


@pytest.fixture(scope="module")
def shown(site: Site) -> Shown:
    """A mixture, a job with a long name that goes on from it, and a sweep, all trained."""
    mixture = site.submit(text=TEXT, name="a mixture", config=SMALL | {"use_moe": True, "n_experts": 4})
    assert site.wait_for(mixture)["status"] == "succeeded"
    grown = site.submit(
        text=TEXT,
        name=UNBROKEN,
        tags={UNBROKEN[:40]: UNBROKEN[:40]},
        config=SMALL | {"use_moe": True, "n_experts": 4, "init_from": {"job_id": mixture, "checkpoint": 50}},
    )
    grid = {"lr": [1e-3, 1e-2], "lr_schedule": ["constant", "cosine"]}
    sweep = site.http.post("/sweeps", json={"text": TEXT, "name": UNBROKEN, "config": SMALL, "grid": grid}).json()
    for job_id in [grown, *sweep["job_ids"]]:
        assert site.wait_for(job_id)["status"] == "succeeded"
    return Shown(mixture, grown, sweep["id"])


VIEWS = {
    "jobs": {
        "/page": ".jobs .spark polyline >> nth=1",
        "/page/new?from={grown}": ".estimate dl.table",
        "/page/jobs/{mixture}": ".mixture .tokens",
        "/page/jobs/{grown}": ".mixture .tokens",
    },
    "experiments": {
        "/page/sweeps": "table.sweeps td.varies",
        "/page/sweeps/{sweep}": ".texts .tokens",
        "/page/compare?job={mixture}&job={grown}": ".texts .tokens",
        "/page/learn": ".learn button",
    },
    "generation": {
        f"{GENERATE}": ".continuation-of .tokens span >> nth=25",
        f"{GENERATE}&mode=score": ".tokens",
        f"{GENERATE}&mode=inspect": ".heads button",
    },
}
"""Addresses of the views, and the last part of each to come."""


@pytest.mark.parametrize("part", VIEWS)
def test_every_view_fits_a_phone(browser: Browser, site: Site, shown: Shown, part: str) -> None:
    with browser.new_context(viewport=PHONE, locale="pt-BR", color_scheme="dark", reduced_motion="reduce") as context:
        guarded = Guarded(context.new_page(), site)
        for path, last in VIEWS[part].items():
            page = guarded.open(path.format_map(vars(shown)))
            expect(page.locator(last).first).to_be_visible(timeout=WAIT_MS)
            expect(page.locator(".skeleton")).to_have_count(0, timeout=WAIT_MS)
            guarded.fits(PHONE["width"])
            guarded.axe()
            page.evaluate(WIDEN)
            guarded.fits(PHONE["width"])
        assert guarded.faults == []
