"""Ways of a user through the page, in a real browser, with jobs that are really trained."""

import re
from pathlib import Path
from runpy import run_path

import pytest
from playwright.sync_api import Browser, expect

from tests.service.page.conftest import Guarded, Site

DOCS = Path(__file__).parents[3] / "docs"
MOST_BYTES_OF_FIRST_VIEW = 150_000
SMALL = {"tokenizer": "bytes", "n_embd": 32, "n_layer": 2, "n_head": 2}
MIXTURE = SMALL | {"use_moe": True, "n_experts": 4, "moe_stride": 1, "epochs": 30}
TEXT = "o rato roeu a roupa do rei de roma, e a rainha com raiva rasgou o resto"


@pytest.fixture(scope="session")
def mixture(site: Site) -> str:
    """The id of a mixture of experts that was trained."""
    job_id = site.submit(text=TEXT, name="a small mixture", config=MIXTURE)
    assert site.wait_for(job_id)["status"] == "succeeded"
    return job_id


def test_a_job_is_submitted_and_watched_through_a_reload_and_a_restart_of_the_service(browser_page: Guarded) -> None:
    page = browser_page.open("/")
    page.get_by_role("link", name="New job").click()
    page.get_by_role("button", name="Use the example").click()
    page.get_by_role("textbox", name="Name").fill("from the page")
    page.get_by_label("epochs", exact=True).fill("many")
    expect(page.get_by_text("Must be a number.")).to_be_visible()
    page.get_by_label("epochs", exact=True).fill("4000")
    for name, value in (("n_embd", "32"), ("n_layer", "2"), ("n_head", "3")):
        page.get_by_label(name, exact=True).fill(value)
    expect(page.get_by_text("must be a multiple of n_head").first).to_be_visible()
    page.get_by_label("n_head", exact=True).fill("2")
    expect(page.get_by_text("Tokens of the text")).to_be_visible()
    browser_page.axe()
    page.get_by_role("button", name="Train", exact=True).click()

    expect(page.get_by_role("heading", name="from the page")).to_be_visible()
    chart = page.get_by_role("img", name=re.compile("Chart of the training loss"))
    expect(chart).to_be_visible()
    first = chart.get_attribute("aria-label")
    expect(chart).not_to_have_attribute("aria-label", str(first))  # the curve moves
    page.reload()
    expect(page.get_by_role("article", name="0 %", exact=True).get_by_text("Perplexity")).to_be_visible()
    with browser_page.outage():
        expect(page.get_by_text("No connection. Trying again")).to_be_visible()
        expect(page.get_by_role("heading", name="from the page")).to_be_visible()
    expect(page.get_by_text("No connection. Trying again")).to_be_hidden()
    browser_page.outage_is_over()
    step = page.locator(".figures dd").first
    seen = step.inner_text()
    expect(step).not_to_have_text(seen)
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("button", name="Delete")).to_be_visible()
    page.get_by_role("link", name="Jobs").click()
    page.get_by_role("searchbox").fill("from the")
    page.get_by_label("Select from the page").check()
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_text("No job matches.")).to_be_visible()
    assert "q=from+the" in page.url


def test_a_mixture_is_read_quarter_by_quarter(browser_page: Guarded, mixture: str) -> None:
    page = browser_page.open(f"/page/jobs/{mixture}")
    last = page.get_by_role("article", name="100 %", exact=True)
    last.get_by_role("group", name="Reconstruction at 100 %").press("ArrowRight")
    expect(last.locator(".pointed-at")).to_contain_text("guess")
    first = page.get_by_role("article", name="0 %", exact=True)
    expect(first.locator(".pointed-at")).to_contain_text("guess")  # the same place in every column
    page.get_by_label("Quarter", exact=True).press("ArrowLeft")
    expect(page).to_have_url(re.compile("quarter=75"))
    expect(page.get_by_text("tokens changed their experts since 50 %")).to_be_visible()
    page.get_by_role("button", name="Expert 2").click()
    expect(page).to_have_url(re.compile("expert=2"))
    expect(page.get_by_text("Expert 2 was given most often:")).to_be_visible()
    page.get_by_role("img", name=re.compile("Map of the load")).hover(position={"x": 120, "y": 32})
    expect(page.get_by_text(re.compile("of the choices, .* times an equal share"))).to_be_visible()
    page.get_by_label("Language").select_option("pt-BR")
    expect(page.get_by_role("heading", name="Mistura de especialistas")).to_be_visible()
    page.get_by_label("Cores").select_option("dark")


def test_a_checkpoint_to_go_on_from_is_chosen_by_the_name_of_its_job(browser_page: Guarded, mixture: str) -> None:
    page = browser_page.open(f"/page/new?example=1&init_from={mixture}@50")
    expect(page.locator("#knob-init_from-chosen")).to_have_text("a small mixture · 50 %")
    options = page.locator("#knob-init_from-checkpoints option")
    expect(options.filter(has_text="a small mixture · 25 %")).to_have_attribute("value", f"{mixture}@25")
    page.locator("#knob-init_from").fill(f"{mixture}@25")
    expect(page.locator("#knob-init_from-chosen")).to_have_text("a small mixture · 25 %")


def test_the_pictures_of_the_readme_can_be_taken(browser_page: Guarded, mixture: str) -> None:
    script = run_path(str(DOCS / "pictures.py"))
    page = browser_page.open(f"/page/jobs/{mixture}")
    for name, picture in script["SHOWN"].items():
        page.locator(f"{picture.last} .tokens").last.wait_for()
        taken = script["take"](page, picture)
        assert (taken[:4], taken[8:12]) == (b"RIFF", b"WEBP")
        for theme in ("light", "dark"):
            assert (DOCS / "pictures" / f"{name}-{theme}.webp").stat().st_size < script["MOST_BYTES"]


def test_the_first_view_is_small(browser_page: Guarded) -> None:
    with browser_page.page.expect_response("**/openapi.json") as last:
        page = browser_page.open("/")
        expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    last.value.finished()
    sizes = page.evaluate(
        "performance.getEntriesByType('resource').concat(performance.getEntriesByType('navigation'))"
        ".map(one => [one.name, one.encodedBodySize])"
    )
    files = {name: size for name, size in sizes if "/static/" in name or name.endswith("/page")}
    assert len(files) > 10
    assert sum(size for _, size in sizes) <= MOST_BYTES_OF_FIRST_VIEW, sizes


def test_a_key_is_asked_for_once_and_a_viewer_changes_nothing(browser: Browser, tmp_path: Path) -> None:
    site = Site(tmp_path)
    try:
        site.start_api()
        site.submit(text=TEXT, name="somebody's", config=SMALL)
        key = site.create_key("ana", "viewer")
        member = {"Authorization": f"Bearer {site.create_key('ana', 'member')}"}
        sweep = {"text": TEXT, "config": SMALL, "seeds": 2, "name": "of the member"}
        assert site.http.post("/sweeps", json=sweep, headers=member).status_code == 201
        with browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-US") as context:
            guarded = Guarded(context.new_page(), site)
            page = guarded.open("/page")
            expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
            guarded.axe()
            guarded.answers_may_be(401)
            page.get_by_label("Key").fill("nmk_wrong")
            page.get_by_role("button", name="Sign in").click()
            expect(page.get_by_text("There is no such key.")).to_be_visible()
            page.get_by_label("Key").fill(key)
            page.get_by_role("button", name="Sign in").click()
            expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
            expect(page.get_by_role("banner").get_by_text("ana")).to_be_visible()
            expect(page.get_by_role("link", name="New")).to_have_count(0)
            page.goto(f"{site.url}/page/new?example=1")
            expect(page.get_by_text("may only read")).to_be_visible()
            page.get_by_role("link", name="Experiments").click()
            expect(page.get_by_text("Trains 6 jobs: dropout 0, 0.2; 3 seeds.")).to_be_visible()
            expect(page.get_by_role("button", name="Run").first).to_be_disabled()
            guarded.axe()
            for view in ("sweeps", "learn", "new"):
                guarded.open(f"/page/{view}")
                expect(page.get_by_text("Your key may only read")).to_be_visible()
                expect(page.get_by_role("link", name="New", exact=False)).to_have_count(0)
            guarded.open("/page/sweeps")
            expect(page.get_by_role("button", name=re.compile("^Run")).first).to_be_disabled()
            page.get_by_role("link", name="of the member").click()
            expect(page.get_by_role("heading", name="of the member")).to_be_visible()
            expect(page.get_by_role("button", name=re.compile("Pause|Cancel|Delete"))).to_have_count(0)
            page.get_by_role("button", name="Sign out").click()
            expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
            assert guarded.faults == []
    finally:
        site.close()
