"""Who may import whom, what stays free of torch, and which single file changes a job's status.

The rules are read off the syntax trees, so an import inside a function counts too; what a process really loads is
checked in a fresh interpreter.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Container, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("nanomoe", "service", "worker")
OPEN_TO_WORKER = ("jobs", "database", "storage", "settings", "errors")
"""The parts of `service` that a worker shares with the API."""

NO_FASTAPI = ("access", "jobs", "database", "storage", "engines", "settings", "errors")
"""The parts of `service` that know neither HTTP nor torch."""

IN_ENGINE = tuple(
    f"service.generation.{name}"
    for name in (
        "engine", "scheduler", "checkpoint_cache", "chunks", "text_stream", "tokens", "pacing", "examiner",
        "compiled_loops",
    )
)  # fmt: skip
"""What runs in the generation engine's process, which loads torch; the API imports none of it."""

SERVICE_BELOW = {
    "service.database": ("access", "jobs", "storage", "engines", "generation", "http", "client", "cli"),
    "service.access": ("jobs", "storage", "engines", "generation", "http", "client", "cli"),
    "service.jobs": ("storage", "engines", "generation", "http", "client", "cli"),
    "service.storage": ("engines", "generation", "http", "client", "cli"),
    "service.engines": ("storage", "generation", "http", "client", "cli"),
}
"""Packages of `service`, and those that stand above each: imports go downwards."""

IN_TRAINER = ("worker.trainer", "worker.job_trainer", "worker.cohort_trainer", "worker.process_state")
"""What runs in the trainer's process alone, which loads torch."""

WEB = ("fastapi", "starlette", "uvicorn")

BELOW = {
    "nanomoe.model": ("training", "evaluation", "generation", "bench"),
    "nanomoe.generation": ("training", "bench"),
    "nanomoe.evaluation": ("training", "bench"),
    "nanomoe.training": ("bench",),
    "nanomoe.store": ("model", "training", "evaluation", "generation", "bench", "checkpoint", "tokenizer"),
}
"""Rooms of `nanomoe`, and those that stand above each."""


def _sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported; `from a import b` gives `a.b`, be `b` a module or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: None if is_package else -1]
                up = package[: len(package) - node.level + 1]
                base = ".".join([*up, base]).rstrip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def _within(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def forbidden(module: str, name: str) -> bool:
    """Whether `module` must not import `name`."""
    package = module.partition(".")[0]
    if package == "nanomoe":
        above = [f"nanomoe.{room}" for below, rooms in BELOW.items() if _within(module, below) for room in rooms]
        return _within(name, "service", "worker", *WEB, "sqlalchemy", "sqlmodel", "httpx", *above)
    if package == "worker":
        return (
            (_within(name, "service") and not _within(name, *(f"service.{part}" for part in OPEN_TO_WORKER)))
            or _within(name, *WEB, "httpx", "sqlalchemy", "sqlmodel")
            or (_within(name, "torch") and module not in IN_TRAINER)
            or (_within(name, "service") and module in IN_TRAINER)
        )
    above = [f"service.{room}" for below, rooms in SERVICE_BELOW.items() if _within(module, below) for room in rooms]
    if _within(name, "worker", *above):
        return True
    if _within(module, *(f"service.{part}" for part in NO_FASTAPI)):
        return _within(name, "torch", *WEB)
    if _within(module, "service.cli"):
        return _within(name, *WEB)
    if _within(module, "service.generation") and _within(name, "service.http", *WEB):
        return True
    if _within(module, *IN_ENGINE):
        return _within(name, *(f"service.{part}" for part in ("jobs", "database", "storage", "settings")))
    return _within(name, "torch", *IN_ENGINE)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """The forbidden imports of one file, as `module:line imports name`."""
    found = _imports(ast.parse(source), module, is_package)
    return [f"{module}:{line} imports {name}" for line, name in found if forbidden(module, name)]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    found = [
        violation
        for path in _sources(package)
        for violation in violations(path.read_text("utf-8"), _module(path), path.name == "__init__.py")
    ]
    assert found == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nanomoe.training.loop", "from service.jobs.tables import Job"),
        ("nanomoe.training.loop", "import worker"),
        ("nanomoe.training.loop", "def late():\n    import service.jobs.queue"),
        ("worker.supervisor", "from service.app import create_app"),
        ("worker.supervisor", "from service.http import schemas"),
        ("worker.supervisor", "import torch.nn"),
        ("worker.trainer", "from service.jobs.queue import claim"),
        ("worker.cohort_trainer", "from service.jobs.queue import claim"),
        ("service.jobs.queue", "from fastapi import HTTPException"),
        ("service.jobs.reads", "import torch"),
        ("service.http.routes.jobs", "from ....worker import supervisor"),
        ("nanomoe.model.gpt", "from nanomoe.training.loop import train"),
        ("nanomoe.generation.engine", "from nanomoe.training import loop"),
        ("worker.attempt", "from service.http import problems"),
        ("service.generation.engine", "from fastapi import FastAPI"),
        ("service.generation.admission", "import torch"),
        ("service.generation.admission", "from service.generation.examiner import Examiner"),
        ("service.generation.admission", "from service.http import schemas"),
        ("service.generation.scheduler", "from service.jobs import reads"),
        ("service.http.routes.generate", "from service.generation import scheduler"),
        ("service.database.migrations.env", "from service.jobs import tables"),
        ("service.access.keys", "from service.jobs.tables import Job"),
        ("service.database.database", "from service.access.roles import Identity"),
        ("service.jobs.submission", "from service.http.schemas import SubmitRequest"),
        ("service.jobs.addressing", "from service.storage.job_folders import job_folder"),
        ("service.storage.fsck", "from service.http import views"),
        ("nanomoe.store.bucket", "from nanomoe.checkpoint import MANIFEST"),
        ("service.http.routes.jobs", "import torch"),
        ("service.engines.pilot", "from worker.supervisor import Supervisor"),
        ("service.engines.on_ray", "from service.http import schemas"),
        ("service.engines.demand", "from service.cli.usage_error import UsageError"),
        ("service.jobs.workers", "from service.engines.fleet import Fleet"),
        ("worker.supervisor", "from service.engines.pilot import Pilot"),
    ],
)
def test_the_check_sees_a_forbidden_import(module: str, source: str) -> None:
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("worker.supervisor", "from service.jobs import queue, reads\nfrom service.errors import LeaseLost"),
        ("worker.trainer", "import torch"),
        ("service.generation.engine", "import torch\nfrom nanomoe.model.gpt import GPT"),
        ("service.generation.engine", "from service.generation.scheduler import Scheduler"),
        ("service.cli.examine", "from service.generation.examiner import LoadedModel"),
        ("service.http.routes.generate", "from service.generation.admission import Generation"),
        ("service.http.routes.jobs", "from ..schemas import JobView\nfrom .parameters import Limit"),
        ("service.storage.orphans", "from service.jobs.tables import Job"),
        ("service.jobs.queue", "from service.database.database import Database"),
        ("service.engines.demand", "from service.jobs.claim_order import claimable"),
        ("nanomoe.training.loop", "from nanomoe.workers_of_old import x\nimport torch"),
    ],
)
def test_the_check_lets_an_allowed_import_pass(module: str, source: str) -> None:
    assert violations(source, module) == []


def status_writes(source: str) -> list[int]:
    """Lines that set a `status`: `.values(status=...)`, `row.status = ...`, `setattr`, SQL text."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(attr="values" | "sqlmodel_update"), args=args, keywords=keywords):
                named = [keyword.arg for keyword in keywords]
                keys = [key for arg in args if isinstance(arg, ast.Dict) for key in arg.keys]
                if "status" in named or any(isinstance(key, ast.Constant) and key.value == "status" for key in keys):
                    lines.append(node.lineno)
            case ast.Assign(targets=targets):
                if any(isinstance(target, ast.Attribute) and target.attr == "status" for target in targets):
                    lines.append(node.lineno)
            case ast.Call(func=ast.Name(id="setattr"), args=[_, ast.Constant(value="status"), _]):
                lines.append(node.lineno)
            case ast.Constant(value=str(sql)) if "update jobs set" in " ".join(sql.lower().split()):
                lines.append(node.lineno)
    return lines


def test_only_the_queue_changes_a_status() -> None:
    writers = {
        _module(path)
        for package in ("service", "worker")
        for path in _sources(package)
        if status_writes(path.read_text("utf-8"))
    }
    assert writers <= {"service.jobs.queue"}


@pytest.mark.parametrize(
    "source",
    [
        "session.exec(update(Job).where(Job.id == id).values(status='failed'))",
        "session.exec(update(Job).values({'status': 'failed'}))",
        "job.status = 'failed'",
        "setattr(job, 'status', 'failed')",
        "connection.execute(text('UPDATE jobs\\n  SET status = 1'))",
    ],
)
def test_the_check_sees_a_status_written(source: str) -> None:
    assert status_writes(source)


def _loaded_by(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `statement`."""
    script = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("nanomoe", {"torch", "pydantic"}),
        ("nanomoe.logs, nanomoe.processes", {"torch", "pydantic"}),
        ("nanomoe.config", {"torch", "transformers"}),
        ("nanomoe.plan", {"torch", "transformers"}),
        ("nanomoe.model.size", {"torch", "transformers"}),
        ("nanomoe.evaluation.metrics", {"torch", "transformers"}),
        ("nanomoe.tokenizer", {"torch", "transformers"}),
        ("service.app", {"torch", "transformers", "worker"}),
        ("service.generation.admission, service.generation.prompts", {"torch", "transformers", "fastapi"}),
        ("service.cli", {"torch", "transformers", "fastapi", "worker"}),
        ("service.client", {"torch", "transformers", "fastapi", "sqlalchemy", "worker"}),
        (
            "service.jobs.queue, service.jobs.reads, service.settings, service.errors",
            {"torch", "transformers", "fastapi"},
        ),
        ("worker.supervisor", {"torch", "transformers", "fastapi", "uvicorn"}),
    ],
)
def test_importing_it_loads_nothing_heavy(module: str, never: set[str]) -> None:
    assert _loaded_by(f"import {module}") & never == set()


def test_the_check_sees_a_loaded_module() -> None:
    assert "fastapi" in _loaded_by("import service.app")


def test_every_source_file_says_what_it_is() -> None:
    files = [path for package in PACKAGES for path in _sources(package)]
    assert [_module(path) for path in files if not ast.get_docstring(ast.parse(path.read_text("utf-8")))] == []


LEANING = re.compile(r"(Of|As)\b|Both\.|Always this|The entries\.")
"""Beginnings that lean on the name above them: nobody who reads the text alone learns what it is about."""


def leaning(source: str) -> list[int]:
    """Lines at which a docstring, or the text under a field or a constant, does not stand alone."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if LEANING.match(node.value.value)
    ]


def test_every_description_stands_alone() -> None:
    files = [path for package in PACKAGES for path in _sources(package)]
    assert [f"{_module(path)}:{line}" for path in files for line in leaning(path.read_text("utf-8"))] == []


@pytest.mark.parametrize("text", ["Of its bytes.", "As `submit`.", "Both.", "Always this.", "The entries."])
def test_the_check_sees_a_description_that_leans_on_a_name(text: str) -> None:
    assert leaning(f'class A:\n    b: int\n    """{text}"""') == [3]
    assert leaning(f'class A:\n    b: int\n    """What it is. {text}"""') == []


def test_no_drawer_is_named_utils() -> None:
    names = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert [path for package in PACKAGES for path in _sources(package) if path.stem in names] == []


def _modules() -> dict[str, Path]:
    return {_module(path): path for package in PACKAGES for path in _sources(package)}


def imports_of(module: str, path: Path, modules: Container[str]) -> set[str]:
    """The modules of ours that a file imports."""
    found = set()
    for _, name in _imports(ast.parse(path.read_text("utf-8")), module, path.name == "__init__.py"):
        found.add(name if name in modules else name.rpartition(".")[0])
    return {name for name in found if name in modules}


def circles(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or through others."""
    sorter = TopologicalSorter(imports)
    try:
        sorter.prepare()
    except CycleError as error:
        return [error.args[1]]
    return []


def test_no_modules_import_each_other() -> None:
    modules = _modules()
    assert circles({module: imports_of(module, path, modules) for module, path in modules.items()}) == []


def test_the_check_sees_a_circle() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def same_names(source: str, module: str) -> list[str]:
    """Names that a file imports both from the standard library and from ours, as a module of either."""
    names = [name for _, name in _imports(ast.parse(source), module, is_package=False)]
    standard = {name.partition(".")[0] for name in names} & sys.stdlib_module_names
    return sorted(standard & {name.rpartition(".")[2] for name in names if _within(name, *PACKAGES)})


def test_no_file_imports_two_modules_of_one_name() -> None:
    found = {module: same_names(path.read_text("utf-8"), module) for module, path in _modules().items()}
    assert {module: names for module, names in found.items() if names} == {}


def test_the_check_sees_two_modules_of_one_name() -> None:
    assert same_names("import queue\nfrom service.jobs import queue as jobs", "service.app") == ["queue"]
    assert same_names("import logging\nfrom service.jobs import queue", "service.app") == []
