"""The client as a distribution of its own: what it carries, what it needs, and that this is enough."""

import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.api import Api

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "service" / "client"
PAGE = (ROOT / "docs" / "client.md").read_text("utf-8")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """`nanomoe-client`, as pip builds it from `service/client`."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=FOLDER, check=True, capture_output=True)
    (path,) = folder.glob("nanomoe_client-*.whl")
    return zipfile.ZipFile(path)


def _requirements(wheel: zipfile.ZipFile) -> list[Requirement]:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    lines = wheel.read(name).decode().splitlines()
    return [Requirement(line.removeprefix("Requires-Dist: ")) for line in lines if line.startswith("Requires-Dist: ")]


def _with_their_own(requirements: list[Requirement]) -> Iterator[metadata.Distribution]:
    """The installed distributions that these requirements bring along."""
    seen: set[str] = set()
    while requirements:
        requirement = requirements.pop()
        if requirement.name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(requirement.name)
        distribution = metadata.distribution(requirement.name)
        yield distribution
        requirements += [Requirement(line) for line in distribution.requires or []]


@pytest.fixture(scope="module")
def python(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the client, what it requires, and nothing else.

    A wheel of Python files is installed by unpacking it, and what it requires is copied from this environment.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    wheel.extractall(packages)
    for distribution in _with_their_own(_requirements(wheel)):
        for file in distribution.files or []:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                (packages / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(file.locate()), packages / file)
    return folder / "bin" / "python"


def _run(python: Path, script: str, **environment: str) -> str:
    command = [python, "-P", "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=python.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_modules_that_the_client_loads_and_no_other(wheel: zipfile.ZipFile) -> None:
    script = (
        "import sys, service.client.asynchronous\n"
        "print(*(m.__file__ for n, m in sys.modules.items() if n.partition('.')[0] in ('nanomoe', 'service')))"
    )
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    expected = {str(Path(file).relative_to(ROOT)) for file in loaded.stdout.split()}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


def test_the_wheel_requires_the_versions_that_nanomoe_requires(wheel: zipfile.ZipFile) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    asked = {Requirement(line).name: Requirement(line) for line in project["dependencies"]}
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE))
    for requirement in _requirements(wheel):
        # What nanomoe gets through another package is in constraints.txt alone.
        assert requirement.specifier.contains(pins[requirement.name])
        assert str(asked.get(requirement.name, requirement)) == str(requirement)
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert version is not None
    assert f"\nVersion: {version[1]}\n" in wheel.read(name).decode()


def test_the_client_alone_works_with_a_service(python: Path, api: Api) -> None:
    job_id = api.finished(name="feita")
    script = f"""
import asyncio, sys
from service.client import AsyncClient, Client, NotFound

with Client() as client:
    job = client.job("{job_id}")
    print(job.name, job.status, job.wait().status, job.metrics().checkpoints[-1].loss)
    try:
        client.job("0" * 32)
    except NotFound as error:
        print(error.code)

async def ask():
    async with AsyncClient() as client:
        return [job.name async for job in client.jobs(status="succeeded")]

print(asyncio.run(ask()))
print([name for name in ("torch", "numpy", "fastapi", "sqlalchemy", "typer") if name in sys.modules])
"""
    said = _run(python, script, NANOMOE_URL=api.url)
    assert said == "feita succeeded succeeded 2.0\njob_not_found\n['feita']\n[]\n"
    with pytest.raises(AssertionError, match="No module named 'torch'"):
        _run(python, "import torch")


def test_the_page_s_example_runs(python: Path, api: Api) -> None:
    (example,) = re.findall(r"<!-- run -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    said = _run(python, example, NANOMOE_URL=api.url)
    assert said.startswith("rato queued 3\ncancelled ['rato'")
