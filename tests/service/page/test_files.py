"""What a browser loads: how it is served, and what its files promise each other."""

import json
import re
from pathlib import Path

import pytest

from nanomoe.config import JobConfig
from tests.api import Api, Serve

STATIC = Path(__file__).parents[3] / "service" / "static"
LANGUAGES = ("en", "pt-BR")
IMPORT = re.compile(r"""^(?:import|export) (?:[^"';]*? from )?"([^"]+)";""", re.MULTILINE)


def texts(language: str, part: str) -> dict[str, object]:
    """The texts of a part of the page, read as JSON: no file of texts holds anything else."""
    content = (STATIC / "i18n" / language / f"{part}.js").read_text("utf-8")
    literal = content.partition("export default ")[2].rstrip().removesuffix(";")
    literal = re.sub(r'(?:(?<=\{ )|(?<=", ))(one|other):', r'"\1":', re.sub(r",(\s*})", r"\1", literal))
    found: dict[str, object] = json.loads(literal)
    return found


PARTS = sorted(path.stem for path in (STATIC / "i18n" / "en").glob("*.js"))


@pytest.mark.parametrize("part", PARTS)
def test_both_languages_have_the_same_texts(part: str) -> None:
    if part == "knobs":
        assert list(texts("en", part)) == [], "English is the API's own"
        assert set(texts("pt-BR", part)) == {f"knobs.{name}" for name in JobConfig.model_fields}
        return
    english, portuguese = (texts(language, part) for language in LANGUAGES)
    assert list(english) == list(portuguese)
    for key, text in english.items():
        other = portuguese[key]
        assert key.startswith(f"{part}."), key
        assert (set(text) if isinstance(text, dict) else None) == (set(other) if isinstance(other, dict) else None), key
        placeholders = [set(re.findall(r"\{(\w+)\}", json.dumps(one))) for one in (text, other)]
        assert placeholders[0] == placeholders[1], key


def test_no_text_is_missing_and_none_is_left_over() -> None:
    sources = {path: path.read_text("utf-8") for path in sources_of_the_page()}
    known = {key for part in PARTS if part != "knobs" for key in texts("en", part)}
    literal = {
        key
        for text in sources.values()
        for key in re.findall(r'"([a-z_]+\.[\w.]+)"', text)
        if key.split(".")[0] in PARTS
    }
    made = {prefix for text in sources.values() for prefix in re.findall(r"t\(`([a-z_]+\.[\w.]*)\$\{", text)}
    assert {key for key in literal if key not in known and not key.endswith(".js")} == set()
    assert {key for key in known if key not in literal and not key.startswith(tuple(made))} == set()


def test_the_form_shows_every_knob() -> None:
    content = (STATIC / "views/new/groups.js").read_text("utf-8").partition("/** What says nothing")[0]
    groups = re.findall(r"knobs: \[(.*?)\]", content, re.DOTALL)
    shown = [name for group in groups for name in re.findall(r'"(\w+)"', group)]
    assert sorted(shown) == sorted(JobConfig.model_fields)


def sources_of_the_page() -> list[Path]:
    return [path for path in STATIC.rglob("*.js") if not {"vendor", "i18n"} & set(path.relative_to(STATIC).parts[:-1])]


def imported(path: Path) -> set[Path]:
    """The files that a module imports before it runs."""
    import_map = json.loads(re.search(r'importmap">(.*?)</script>', index(), re.DOTALL)[1])["imports"]  # type: ignore[index]
    return {
        STATIC / name.removeprefix("/static/") if (name := import_map.get(given, given)).startswith("/static/")
        else (path.parent / name).resolve()
        for given in IMPORT.findall(path.read_text("utf-8"))
    }  # fmt: skip


def index() -> str:
    return (STATIC / "index.html").read_text("utf-8")


def test_the_document_preloads_what_the_first_view_needs_and_nothing_else() -> None:
    needed: set[Path] = set()
    left = [STATIC / "app.js", STATIC / "views/jobs.js"]
    while left:
        path = left.pop()
        if path not in needed:
            needed.add(path)
            left += imported(path)
    listed = re.findall(r'modulepreload" href="/static/([^"]+)"', index())
    assert {path.relative_to(STATIC).as_posix() for path in needed if "vendor" not in path.parts} == {
        name for name in listed if not name.startswith("vendor/")
    }


@pytest.mark.parametrize("path", sources_of_the_page(), ids=lambda path: path.relative_to(STATIC).as_posix())
def test_every_import_names_a_file(path: Path) -> None:
    assert [found for found in imported(path) if not found.is_file()] == []


def test_the_root_leads_to_the_page_whose_policy_allows_its_import_map_alone(api: Api) -> None:
    root = api.http.get("/")
    assert (root.status_code, root.headers["location"]) == (307, "/page")
    page = api.http.get("/page/jobs/some-id")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'self' 'sha256-[\w+/=]{44}';", policy)
    assert "unsafe" not in policy
    inline = re.findall(r"<script(?![^>]*src=)[^>]*>", page.text)
    assert inline == ['<script type="importmap">']
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert addresses
    assert all(address.startswith("/static/") for address in addresses)


def test_files_are_compressed_and_not_sent_twice(api: Api) -> None:
    plain = api.http.get("/static/app.js", headers={"Accept-Encoding": "identity"})
    packed = api.http.get("/static/app.js", headers={"Accept-Encoding": "gzip"})
    assert plain.headers["content-type"] == packed.headers["content-type"] == "text/javascript; charset=utf-8"
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.content == plain.content == (STATIC / "app.js").read_bytes()
    assert packed.headers["etag"] != plain.headers["etag"]
    again = api.http.get("/static/app.js", headers={"If-None-Match": packed.headers["etag"], "Accept-Encoding": "gzip"})
    assert (again.status_code, again.content) == (304, b"")
    assert api.http.get("/static/vendor/preact/preact.mjs").headers["content-type"] == "text/javascript; charset=utf-8"


def test_the_page_can_be_turned_off(serve: Serve) -> None:
    api = serve(page=False)
    assert [api.http.get(path).status_code for path in ("/", "/page", "/page/new", "/docs")] == [404, 404, 404, 200]
