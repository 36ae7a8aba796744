"""The README and the pages of `docs/` hold together: tables made from the code, links, a short README."""

import ast
import re
from pathlib import Path

import pytest

from service.app import create_app
from service.settings import Settings
from tests.documents import DOCS, PAGES, README, ROOT, TABLES, TRANSLATIONS, tracked, with_tables
from tests.markdown import Block, blocks, links, slugs

MOST_LINES = 250
"""Of a README: what is longer belongs into a page of its own."""

EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
NOTES = ("", "run", "stays running")
"""What may stand above a block of commands that is run."""


@pytest.mark.parametrize("page", [README, *TRANSLATIONS], ids=lambda page: page.name)
def test_the_readme_stays_short(page: Path) -> None:
    assert len(page.read_text("utf-8").splitlines()) <= MOST_LINES


def contents(block: Block) -> tuple[str, ...]:
    """A block and its answer, wherever it stands."""
    return (block.note, block.language, block.text, *(contents(block.answer) if block.answer else ()))


@pytest.mark.parametrize("page", TRANSLATIONS, ids=lambda page: page.name)
def test_a_translation_has_the_blocks_and_the_links_of_the_readme(page: Path) -> None:
    original, translated = (file.read_text("utf-8") for file in (README, page))
    assert [contents(block) for block in blocks(translated)] == [contents(block) for block in blocks(original)]

    def to_files(text: str) -> list[str]:
        """Its links but for those to headings, whose names are translated, and to the other languages."""
        others = {file.name for file in (README, *TRANSLATIONS)}
        return [target for target in links(text) if target[0] != "#" and target not in others]

    assert to_files(translated) == to_files(original)
    assert len(links(translated)) == len(links(original))
    assert page.name in links(original)
    assert README.name in links(translated)


@pytest.mark.parametrize("page", TABLES)
def test_tables_and_tree_are_made_from_the_code(page: str) -> None:
    assert with_tables(DOCS / page) == (DOCS / page).read_text("utf-8"), "make readme writes them"


def test_the_routes_are_those_of_the_service(tmp_path: Path) -> None:
    paths = create_app(Settings(_env_file=None, data_dir=tmp_path)).openapi()["paths"]
    served = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    described = re.findall(r"^\| `([A-Z]+ /\S*)` \|", (DOCS / "routes.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(described) == sorted(served)


@EVERY_PAGE
def test_a_block_that_is_not_run_says_why(page: Path) -> None:
    commands = [block for block in blocks(page.read_text("utf-8")) if block.language in ("sh", "python")]
    assert [block.line for block in commands if not block.is_run and len(block.note) < len("not run: because")] == []
    assert [block.line for block in commands if block.is_run and block.note not in NOTES] == []


@EVERY_PAGE
def test_every_block_names_its_language(page: Path) -> None:
    known = ("sh", "python", "json", "text", "mermaid")
    assert [block.line for block in blocks(page.read_text("utf-8")) if block.language not in known] == []


@EVERY_PAGE
def test_every_link_leads_somewhere(page: Path) -> None:
    assert [target for target in links(page.read_text("utf-8")) if not _leads_somewhere(page, target)] == []


def _leads_somewhere(page: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    to = (page.parent / path).resolve() if path else page
    if not to.exists() or not to.is_relative_to(ROOT):
        return False
    return not anchor or (to.suffix == ".md" and anchor in slugs(to.read_text("utf-8")))


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    waiting = [README]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            if page.suffix == ".md":
                targets = links(page.read_text("utf-8"))
                waiting += [
                    (page.parent / target.partition("#")[0]).resolve() for target in targets if target[0] != "#"
                ]
    assert {ROOT / name for name in tracked("docs")} <= reached


def places(text: str) -> list[str]:
    """What a text names of the code, in backquotes: `folder/`, `folder/file.py`, `folder/file.py:Class.method`."""
    return re.findall(r"`((?:nanomoe|service|worker|tests|docs)/[\w./-]*(?::[\w.]+)?)`", text)


def _names(node: ast.stmt) -> list[str]:
    """What a statement defines: a class, a function, or variables."""
    match node:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def is_there(place: str) -> bool:
    """Whether the file or folder exists, and defines that class, function, method or variable."""
    path, _, name = place.partition(":")
    if not (ROOT / path).exists() or path.endswith("/") != (ROOT / path).is_dir():
        return False
    body: list[ast.stmt] = ast.parse((ROOT / path).read_text("utf-8")).body if name else []
    for part in name.split(".") if name else ():
        found = next((node for node in body if part in _names(node)), None)
        if found is None:
            return False
        body = getattr(found, "body", [])
    return True


@EVERY_PAGE
def test_every_place_in_the_code_that_is_named_exists(page: Path) -> None:
    assert [place for place in places(page.read_text("utf-8")) if not is_there(place)] == []


def test_a_place_that_is_not_there_is_seen() -> None:
    named = "`tests/`, `tests/markdown.py:Block.is_run` and `worker/held_lease.py`"
    assert [is_there(place) for place in places(named)] == [True, True, True]
    gone = "`tests/markdown.py/`, `tests`, `tests/markdown.py:Block.runs`, `worker/gone.py`, `tests/markdown.py:run`"
    assert [is_there(place) for place in places(gone)] == [False] * 4
