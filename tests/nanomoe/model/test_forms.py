"""The list of the block's other forms names files that exist."""

import re
from pathlib import Path

import nanomoe.model

ROOT = Path(__file__).parents[3]


def test_the_list_of_the_other_forms_of_the_block_names_files_that_exist() -> None:
    named = re.findall(r"[\w/]+/\w+\.py", nanomoe.model.__doc__ or "")
    assert len(named) == 16
    assert [name for name in named if not (ROOT / name).is_file()] == []
