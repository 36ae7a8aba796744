"""The README and the pages of `docs/`: which there are, and what they and `.env.example` say about the code.

`python -m tests.documents` (`make readme`) writes it; test_documents.py and test_packaging.py compare.
"""

import ast
import inspect
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pydantic import BaseModel

from nanomoe.config import JobConfig, ModelConfig, SampleConfig, TrainConfig
from service import client
from service.access.quotas import Quotas
from service.cli import glossary
from service.client.job_fields import ViewField
from service.http.permissions import PERMISSIONS, Permission
from service.settings import Settings

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TRANSLATIONS = (ROOT / "README.pt-BR.md",)
"""The README in other languages: its commands are the README's own."""

DOCS = ROOT / "docs"
PAGES = (README, *TRANSLATIONS, *sorted(DOCS.glob("*.md")))
ENV_EXAMPLE = ROOT / ".env.example"


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def _one_allowed(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    match schema.get("type"):
        case "null":
            return "null"
        case "boolean":
            return "true, false"
        case "array":
            return f"[{', '.join(_one_allowed(item) for item in schema['prefixItems'])}]"
        case "integer" | "number":
            low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
            below = schema.get("exclusiveMaximum")
            lowest = _number(low) if "minimum" in schema else f"above {_number(low)}"
            return f"{lowest} to {_number(high)}" if below is None else f"{lowest} to below {_number(below)}"
        case "string":
            return "text"
    return "`{job_id, checkpoint}`"


def _allowed(schema: dict[str, Any]) -> str:
    return " or ".join(_one_allowed(choice) for choice in schema.get("anyOf", [schema]))


def _default(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(_default(item) for item in value)}]"
    return f"`{value}`" if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else f"{value}"


def _meaning(model: type[BaseModel], name: str) -> str:
    text = model.model_fields[name].description
    assert text, f"{model.__name__}.{name} has no docstring"
    return " ".join(text.split())


def config_table() -> str:
    """Every key of a job's config: what it may be, its default, its meaning."""
    properties = JobConfig.model_json_schema()["properties"]
    rows = []
    groups: list[tuple[str, type[BaseModel]]] = [
        ("model", ModelConfig),
        ("training", TrainConfig),
        ("sampling at checkpoints", SampleConfig),
    ]
    for title, group in groups:
        rows.append(f"| **{title}** | | | |")
        rows += [
            f"| `{name}` | {_allowed(properties[name])} | {_default(field.default)} | {_meaning(group, name)} |"
            for name, field in group.model_fields.items()
        ]
    return "\n".join(["| key | may be | default | meaning |", "| --- | --- | --- | --- |", *rows])


def figures_table() -> str:
    """Every figure of a checkpoint, and its meaning."""
    return _words("in a checkpoint", glossary.of_checkpoint())


def mixture_table() -> str:
    """Every figure of a mixture of experts, and its meaning."""
    return _words("in `moe`", glossary.of_mixture())


def _words(heading: str, words: dict[str, str]) -> str:
    rows = [f"| `{word}` | {meaning} |" for word, meaning in words.items()]
    return "\n".join([f"| {heading} | is |", "| --- | --- |", *rows])


def default_settings() -> dict[str, str]:
    """What each `NANOMOE_...` variable is when nobody sets it, paths as seen from the project's folder."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NANOMOE_")}
    with patch.dict(os.environ, clean, clear=True):
        values = Settings(_env_file=None).model_dump()
    return {f"NANOMOE_{name.upper()}": _setting(value) for name, value in values.items()}


def _setting(value: Any) -> str:
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace(f"{Path.cwd()}/", "")


def settings_table() -> str:
    """Every variable, its default and its meaning."""
    rows = [
        f"| `{variable}` | {f'`{default}`' if default else ''} | {_meaning(Settings, name)} |"
        for name, (variable, default) in zip(Settings.model_fields, default_settings().items(), strict=True)
    ]
    return "\n".join(["| variable | default | meaning |", "| --- | --- | --- |", *rows])


def env_example() -> str:
    """A `.env` in which every variable stands, commented out, with its default."""
    blocks = [
        f"# {_meaning(Settings, name)}\n#{variable}={default}\n"
        for name, (variable, default) in zip(Settings.model_fields, default_settings().items(), strict=True)
    ]
    head = (
        "# Copy this file to .env and change what you need. API, worker and command line read it from their folder.\n"
    )
    return "\n".join([head, *blocks])


def methods_table(kind: type) -> str:
    """Every public method and property of a class of the client, with the first sentence of its docstring."""
    fields, methods = [], []
    for name, member in inspect.getmembers(kind):
        if name.startswith("_") or name in ("send", "open", "continuation"):  # those are for the client's own methods
            continue
        if isinstance(member, ViewField | property):
            fields.append(f"| `{name}` | {_sentence(member)} |")
        else:
            methods.append(f"| `{name}({_parameters(member)})` | {_sentence(member)} |")
    return "\n".join(["| field or method | what it is or does |", "| --- | --- |", *fields, *methods])


def _sentence(member: object) -> str:
    text = " ".join((inspect.getdoc(member) or "").partition("\n\n")[0].split())
    return re.split(r"(?<=\.) ", text)[0]


def _parameters(method: Callable[..., object]) -> str:
    """Names and defaults as they are called, without types."""
    _, *parameters = inspect.signature(method).parameters.values()
    shown = []
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        shown.append(str(parameter.replace(annotation=parameter.empty)))
    return ", ".join(shown)


def errors_table() -> str:
    """Every exception of the client."""
    kinds = [kind for name in client.__all__ if issubclass(kind := getattr(client, name), client.ClientError)]
    rows = [f"| `{kind.__name__}` | `{kind.__base__.__name__}` | {inspect.getdoc(kind)} |" for kind in kinds]
    return "\n".join(["| class | is a | means |", "| --- | --- | --- |", *rows])


NOT_PYTHON = {
    "nanomoe/assets/README.md": "Where these files come from, and their licences.",
    "nanomoe/assets/paragraph.pt.txt": "The example text: one paragraph.",
    "nanomoe/assets/ptbr-8k": "The bundled tokenizer.",
    "service/client/pyproject.toml": "The client as a distribution of its own, without torch.",
    "service/database/migrations/script.py.mako": "What a new migration starts as.",
    "service/database/migrations/versions": "Every step of the schema.",
    "service/static/README.md": "How a view of the page is made.",
    "service/static/icon.svg": "The page's icon.",
    "service/static/vendor": "What the page and the documentation in the browser need of others, with licences.",
    "worker/docker-compose.cluster.yml": "PostgreSQL, a bucket, the API and workers without a common folder.",
    "worker/docker-compose.gpu.yml": "The worker on an NVIDIA GPU.",
}
"""Files that carry no docstring, and folders that are told in one line."""


def tree() -> str:
    """The sources of the three packages, each with the first sentence of its own docstring."""
    lines: list[str] = []
    told: set[Path] = set()
    for name in sorted(tracked("nanomoe", "service", "worker"), key=lambda name: Path(name).parts):
        path = Path(name)
        whole = next((str(part) for part in [path, *path.parents] if str(part) in NOT_PYTHON), None)
        if whole:
            path, sentence = Path(whole), NOT_PYTHON[whole]
        elif path.name == "__init__.py":
            path, sentence = path.parent, _first_sentence(path)
        else:
            sentence = _first_sentence(path)
        for folder in [*reversed(path.parents)][1:]:
            if folder not in told:
                told.add(folder)
                package = folder / "__init__.py"
                lines.append(_branch(folder, _first_sentence(package) if (ROOT / package).exists() else ""))
        if path not in told:
            told.add(path)
            lines.append(_branch(path, sentence))
    return "\n".join(["```text", *lines, "```"])


def _branch(path: Path, sentence: str) -> str:
    depth = len(path.parts) - 1
    name = f"{'  ' * depth}{path.name}{'/' if (ROOT / path).is_dir() else ''}"
    return f"{name:<26} {sentence}".rstrip()


_COMMENT = {".js": r"/\*\*(.*?)\*/", ".css": r"/\*(.*?)\*/", ".html": r"<!--(.*?)-->"}


def _first_sentence(path: Path) -> str:
    text: str | None
    if path.suffix in _COMMENT:
        found = re.search(_COMMENT[path.suffix], (ROOT / path).read_text("utf-8"), re.DOTALL)
        text = found and re.sub(r"^ ?\* ?", "", found[1].strip(), flags=re.MULTILINE)
    else:
        assert path.suffix == ".py", f"say in NOT_PYTHON what {path} is"
        text = ast.get_docstring(ast.parse((ROOT / path).read_text("utf-8")))
    assert text, f"{path} does not say what it is"
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=\.) ", paragraph)[0]


_WHO = {
    Permission.OPEN: "none is needed",
    Permission.SESSION: "none is needed; a valid one says who asks",
    Permission.READ: "viewer, member, admin",
    Permission.CHANGE: "member, admin",
    Permission.ADMIN: "admin",
}


def permissions_table() -> str:
    """Every route, and whose key it needs."""
    rows = [f"| `{method} {path}` | {_WHO[permission]} |" for (method, path), permission in PERMISSIONS.items()]
    return "\n".join(["| route | whose key |", "| --- | --- |", *rows])


def quotas_table() -> str:
    """Every quota, and its meaning."""
    return _words("quota", {name: _meaning(Quotas, name) for name in Quotas.model_fields})


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "access.md": {"permissions": permissions_table, "quotas": quotas_table},
    "architecture.md": {"tree": tree},
    "client.md": {
        "Client": lambda: methods_table(client.Client),
        "JobHandle": lambda: methods_table(client.JobHandle),
        "SweepHandle": lambda: methods_table(client.SweepHandle),
        "Comparison": lambda: methods_table(client.Comparison),
        "errors": errors_table,
    },
    "config.md": {"config": config_table},
    "metrics.md": {"figures": figures_table},
    "mixture_of_experts.md": {"mixture": mixture_table},
    "settings.md": {"settings": settings_table},
}
"""What each page of `docs/` has made from the code, by the name of its place."""


def with_tables(page: Path) -> str:
    """The page's text with its tables made anew, between `<!-- config -->` and `<!-- /config -->` and the like."""
    text = page.read_text("utf-8")
    for name, table in TABLES.get(page.name, {}).items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        made = table()
        text, n = re.subn(pattern, lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text, flags=re.DOTALL)
        assert n == 1, f"{page.name}: there are {n} places for the {name} table"
    return text


def tracked(*under: str) -> list[str]:
    """The project's own files, those that are not committed yet included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *under]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


if __name__ == "__main__":
    for page in TABLES:
        (DOCS / page).write_text(with_tables(DOCS / page), "utf-8")
    ENV_EXAMPLE.write_text(env_example(), "utf-8")
