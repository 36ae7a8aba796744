"""docs/architecture.md lists every file that holds the arithmetic of a block."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_every_file_that_computes_the_activation_is_listed() -> None:
    page = (ROOT / "docs/architecture.md").read_text("utf-8")
    section = page.partition("### To change the model's block\n")[2].partition("\n## ")[0]
    listed = set(re.findall(r"^\| `([\w/]+\.py)` \|", section, re.MULTILINE))
    sources = [*(ROOT / "nanomoe").rglob("*.py"), *(ROOT / "docs").glob("*.py")]
    computing = {
        source.relative_to(ROOT).as_posix() for source in sources if "gelu" in source.read_text("utf-8").lower()
    }
    assert computing
    assert computing - listed == set()
