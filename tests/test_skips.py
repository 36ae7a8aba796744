"""In CI a test may be skipped for want of a GPU, and for nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GPU = "@pytest.mark.gpu\ndef test_on_the_gpu(): pytest.skip('no CUDA device')\n"
PASSED = "def test_passes(): pass\n"
SKIPPED = "def test_is_skipped(): pytest.skip('somehow')\n"
NOT_IMPORTED = "pytest.importorskip('there_is_no_such_module')\n"


@pytest.mark.parametrize(
    ("tests", "ci", "status"),
    [(PASSED + GPU, True, 0), (PASSED + SKIPPED, True, 1), (PASSED + SKIPPED, False, 0)],
)
def test_a_silent_skip_fails_in_ci(tmp_path: Path, tests: str, ci: bool, status: int) -> None:
    done = _run(tmp_path, {"test_it.py": tests}, ci=ci)
    assert done.returncode == status, done.stdout
    assert ("skipped in CI" in done.stdout) == (status == 1)


def test_a_module_that_is_skipped_whole_fails_in_ci_too(tmp_path: Path) -> None:
    done = _run(tmp_path, {"test_it.py": PASSED, "test_other.py": NOT_IMPORTED}, ci=True)
    assert done.returncode == 1
    assert "test_other.py" in done.stdout


def _run(folder: Path, files: dict[str, str], *, ci: bool) -> subprocess.CompletedProcess[str]:
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n", "utf-8")
    for name, content in files.items():
        (folder / name).write_text(f"import pytest\n{content}", "utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | ({"CI": "true"} if ci else {})
    command = [sys.executable, "-m", "pytest", "-p", "tests.skips", "-p", "no:cacheprovider", str(folder)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
