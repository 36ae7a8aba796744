"""Sweeps, comparisons, generation and the first lesson in a real browser, with jobs that are really trained."""

import json
import re
from typing import Any

import pytest
from playwright.sync_api import Browser, Route, expect

from tests.service.page.conftest import PHONE, Guarded, Site

ENGINE_MS = 60_000
"""Longest time until the engine, which is started by the first request, has loaded torch and generated."""

SMALL = {"tokenizer": "bytes", "n_embd": 16, "n_layer": 2, "n_head": 2, "epochs": 8}
TEXT = "O rato roeu a roupa do rei de Roma, e a rainha com raiva, não, ró, rasgou o resto."


@pytest.fixture(scope="module")
def sweep(site: Site) -> dict[str, Any]:
    """A sweep over two parameters with two seeds each, whose jobs are mixtures of experts, all trained."""
    request = {
        "text": TEXT,
        "name": "a <sweep> with a name that is long enough to need a second line on a telephone",
        "config": SMALL | {"use_moe": True, "n_experts": 4, "moe_stride": 1},
        "grid": {"lr": [1e-3, 1e-2], "n_embd": [16, 32]},
        "seeds": 2,
    }
    answer = site.http.post("/sweeps", json=request)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    for job_id in made["job_ids"]:
        assert site.wait_for(job_id)["status"] == "succeeded"
    return made


def test_a_sweep_is_read_from_its_curves_to_its_texts_and_saved(browser_page: Guarded, sweep: dict[str, Any]) -> None:
    page = browser_page.open("/page/sweeps")
    page.get_by_role("link", name=sweep["name"]).click()
    rows = page.locator("table.compared tbody tr")
    expect(rows).to_have_count(4)
    expect(rows.first).to_contain_text("±")
    expect(page.locator(".overlay figcaption")).to_contain_text("lr=0.01, n_embd=32")
    rows.nth(1).hover()
    expect(page.locator(".overlay figcaption")).to_contain_text("lr=0.001, n_embd=32 · Step 8:")
    page.get_by_role("button", name="Group seeds").click()
    expect(rows).to_have_count(8)
    page.get_by_role("combobox", name="Quarter").select_option("best")
    page.get_by_label("Value at step").fill("4")
    page.get_by_label("Value at step").press("Enter")
    expect(page.get_by_role("button", name="train loss at 4")).to_be_visible()
    page.get_by_role("button", name="perplexity").click()
    figures = [float(one) for one in page.locator("table.compared td:nth-last-child(3)").all_inner_texts() if one]
    assert len(figures) == 8
    page.get_by_role("button", name="Heat map").click()
    expect(page.get_by_role("img", name=re.compile("loss .* over lr"))).to_be_visible()
    text = page.get_by_role("article", name=re.compile("100 %")).first
    text.get_by_role("group", name=re.compile("training text")).press("ArrowRight")
    expect(text.locator(".pointed-at")).to_contain_text("loss")
    expect(text.locator(".tokens")).to_contain_text("não, ró")  # characters of two tokens
    with page.expect_download() as download:
        page.get_by_role("link", name="Save as one file").click()
    file = download.value.path().read_text("utf-8")
    assert download.value.suggested_filename == "comparison.html"
    assert file.count("<svg") == 2
    assert all(job_id in file for job_id in sweep["job_ids"])
    address = page.url
    page.goto("about:blank")
    page.goto(address)  # somebody else opens the same address
    expect(page.get_by_role("button", name="Heat map")).to_have_attribute("aria-pressed", "true")
    expect(rows).to_have_count(8)


def test_the_form_says_which_jobs_of_a_sweep_are_trained_together(browser_page: Guarded) -> None:
    page = browser_page.open("/page/new?preset=learning-rate")
    together = page.locator(".estimate dl.table div", has_text="Trained together")
    expect(together.locator("dd")).to_have_text("6 alone")  # the worker of these tests trains each job by itself
    shown = page.evaluate(
        """async () => {
          const { cohorts } = await import("/static/views/new_job.js");
          const of = (...sizes) => cohorts(sizes.map(([n_jobs, n_cohorts]) => ({ n_jobs, n_cohorts })));
          return [of([4, 2], [3, 1]), of([4, 1000], [1, 1]), of([1, 3]), cohorts(null)];
        }"""
    )
    assert shown == ["2 × 4, 1 × 3", "1,000 × 4, 1 alone", "3 alone", "not known: no worker"]


def test_a_group_that_still_runs_is_never_a_mean_over_different_quarters(browser_page: Guarded) -> None:
    page = browser_page.open("/page/sweeps")
    # Of three jobs one has ended, one is at its second quarter, and one waits.
    spreads = page.evaluate(
        """async () => {
          const { reachedBy, rowFigure } = await import("/static/parts/compared.js");
          const job = (...losses) => ({ quarters: losses.map((loss, n) => ({ percent: 25 * n, metrics: { loss } })) });
          const jobs = [job(9, 5, 3, 0.5, 1), job(9.5, 5.5), job()];
          const of = (quarter) => [reachedBy(jobs, quarter).n, rowFigure({ jobs }, "loss", quarter)?.mean ?? null];
          return ["last", "best", "25", "100"].map(of);
        }"""
    )
    assert spreads == [[1, 1], [1, 0.5], [2, 5.25], [1, 1]]
    ends = page.evaluate(
        """async () => {
          const { meanOf } = await import("/static/charts/envelopes.js");
          const job = (isWhole, ...low) => ({ isWhole, bucket_steps: 1, last_step: low.length, low, high: low });
          const meansOf = (...jobs) => meanOf(jobs).y;
          return [
            meansOf(job(true, 8, 6, 4), job(false, 10)),
            meansOf(job(true, 8, 6, 4), job(true, 10, 8)),
            meansOf(job(false, 8, 6, 4), job(false, 10, 8)),
          ];
        }"""
    )
    assert ends == [[9, 6, 4], [9, 7], [9, 7, 4]]


def test_a_sweep_is_run_paused_cancelled_and_deleted(browser_page: Guarded, site: Site) -> None:
    request = {"text": TEXT, "name": "stopped", "config": SMALL | {"epochs": 100_000}, "seeds": 2}
    assert site.http.post("/sweeps", json=request).status_code == 201
    page = browser_page.open("/page/sweeps")
    page.get_by_role("link", name="stopped").click()
    for action in ("Pause", "Resume"):
        page.get_by_role("button", name=action).click()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("2 of 2 jobs ended")).to_be_visible()
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_role("heading", name="Experiments", exact=True)).to_be_visible()
    expect(page.get_by_role("link", name="stopped")).to_be_hidden()


def test_a_comparison_outlives_a_restart_of_the_service(browser_page: Guarded, site: Site) -> None:
    request = {"text": TEXT, "name": "restarted", "config": SMALL | {"epochs": 100_000}, "grid": {"lr": [1e-3, 1e-2]}}
    made = site.http.post("/sweeps", json=request).json()
    page = browser_page.open(f"/page/sweeps/{made['id']}")
    step = page.locator(".overlay figcaption")
    rows = page.locator("table.compared tbody tr")
    expect(rows).to_have_count(2)
    rows.first.hover()
    expect(step).to_contain_text(re.compile(r"Step \d"))
    with browser_page.outage():
        expect(page.get_by_text("No connection. Trying again")).to_be_visible()
        expect(rows).to_have_count(2)
    expect(page.get_by_text("No connection. Trying again")).to_be_hidden()
    browser_page.outage_is_over()
    seen = step.inner_text()
    rows.last.hover()
    rows.first.hover()
    expect(step).not_to_have_text(seen)  # the curve has gone on
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("2 of 2 jobs ended")).to_be_visible()


def test_checkpoints_continue_score_and_are_looked_into(browser_page: Guarded, sweep: dict[str, Any]) -> None:
    job = sweep["job_ids"][0]
    page = browser_page.open(f"/page/generate?job={job}")
    page.get_by_role("textbox", name="Prompt").fill("O rato não")
    page.get_by_label("temperature", exact=True).fill("-1")
    expect(page.get_by_role("button", name="Generate")).to_be_disabled()
    page.get_by_label("temperature", exact=True).fill("0.5")
    page.get_by_role("button", name="All quarters").click()
    page.get_by_role("textbox", name="Prompt").press("Control+Enter")
    columns = page.locator(".continuation-of")
    expect(columns).to_have_count(5)
    expect(page.get_by_text("25 tokens")).to_have_count(5, timeout=ENGINE_MS)
    first = columns.first.get_by_role("group")
    said = first.inner_text()
    first.locator("span").nth(2).hover()
    expect(columns.first.locator(".likely.chosen")).to_have_count(1)
    browser_page.axe()
    page.reload()  # the same seed
    expect(page.get_by_text("25 tokens")).to_have_count(5)
    assert first.inner_text() == said

    page.get_by_role("button", name="Only the first").click()
    page.get_by_role("button", name="Score").first.click()
    page.get_by_role("textbox", name="Text").press("Control+Enter")
    expect(page.get_by_text("Longest span that stands in the training text")).to_contain_text("O rato")
    expect(page.locator(".tokens")).to_have_text("O rato não")
    browser_page.axe()
    page.get_by_role("button", name="Look inside").first.click()
    page.get_by_role("textbox", name="Text").press("Control+Enter")
    page.get_by_role("button", name="Attention in layer 1, head 1").click()
    expect(page).to_have_url(re.compile("layer=1&head=1"))
    page.get_by_role("group", name=re.compile("attended")).press("ArrowRight")
    expect(page.get_by_text("“O” attends, in layer 1, head 1, most to “O” 100%")).to_be_visible()
    expect(page.get_by_role("img", name="Routing")).to_be_visible()


def test_the_first_lesson_is_given_in_portuguese_on_a_phone(browser: Browser, site: Site) -> None:
    def small(route: Route) -> None:
        """The lesson's own jobs, but of a size for a test."""
        if route.request.method != "POST":
            return route.continue_()
        body = json.loads(route.request.post_data or "")
        body["config"] = SMALL | body.get("config", {}) | {"epochs": 8}
        return route.continue_(post_data=json.dumps(body))

    with browser.new_context(viewport=PHONE, locale="pt-BR", color_scheme="dark") as context:
        guarded = Guarded(context.new_page(), site)
        guarded.page.set_default_timeout(60_000)
        guarded.page.route("**/jobs", small)
        page = guarded.open("/page/learn")
        page.get_by_role("button", name="Treinar", exact=True).click()
        expect(page.get_by_role("article", name="100 %, 100 %")).to_be_visible()
        page.get_by_role("button", name="Continuar").click()
        expect(page.get_by_text("25 tokens")).to_have_count(2, timeout=ENGINE_MS)
        page.get_by_role("button", name="Um quarto da largura").click()
        expect(page.get_by_role("row", name=re.compile("um quarto da largura .*100 %"))).to_be_visible()
        page.get_by_role("button", name="Fazer crescer").click()
        expect(page.get_by_text(re.compile("em 0 %, como o modelo de que cresceu; .* em 100 %"))).to_be_visible()
        guarded.fits(PHONE["width"])
        guarded.axe()
        page.reload()
        expect(page.get_by_role("row", name=re.compile("um quarto da largura .*100 %"))).to_be_visible()
        assert guarded.faults == []
