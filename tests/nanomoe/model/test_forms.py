"""docs/architecture.md lists every file that holds the arithmetic of a block."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_every_file_that_computes_the_activation_is_listed() -> None:
    page = (ROOT / "docs/architecture.md").read_text("utf-8")
    section = page.partition("### To change the model's block\n")[2].partition("\n## ")[0]
    rows = "\n".join(line for line in section.splitlines() if line.startswith("| `"))
    listed = re.findall(r"`((?:nanomoe|docs)/[\w/]+(?:\.py|/))`", rows)
    sources = [*(ROOT / "nanomoe").rglob("*.py"), *(ROOT / "docs").glob("*.py")]
    computing = [
        source.relative_to(ROOT).as_posix() for source in sources if "gelu" in source.read_text("utf-8").lower()
    ]
    assert computing
    folders = tuple(place for place in listed if place.endswith("/"))
    assert [name for name in computing if name not in listed and not name.startswith(folders)] == []
