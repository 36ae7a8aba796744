"""The image, the compose files, the wheel and the pins: valid, and naming only what exists.

No container engine is needed: what a container would run is run here, in a process.
"""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from service.database.opening import open_database
from service.jobs.workers import list_workers
from service.settings import Settings
from tests.documents import ENV_EXAMPLE, default_settings, env_example, tracked
from worker.timing import Timing

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
NOT_INSTALLED = {"triton"}
"""Extras that `make test` does without."""

GPU = yaml.safe_load((ROOT / "worker/docker-compose.gpu.yml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def _dockerfile() -> list[tuple[str, str]]:
    """Instruction and arguments of each line, continuations joined."""
    text = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def _image_environment() -> dict[str, str]:
    pairs = " ".join(arguments for instruction, arguments in _dockerfile() if instruction == "ENV").split()
    return dict(pair.split("=", 1) for pair in pairs)


def test_the_dockerfile_is_clean() -> None:
    assert subprocess.run([BIN / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True).stdout == ""


@pytest.mark.parametrize(
    "path", ["docker-compose.yml", "worker/docker-compose.cluster.yml", "worker/docker-compose.gpu.yml"]
)
def test_the_compose_files_follow_the_specification(path: str) -> None:
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", ROOT / path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_is_built_in_stages_and_runs_without_root() -> None:
    instructions = _dockerfile()
    stages = [index for index, (instruction, _) in enumerate(instructions) if instruction == "FROM"]
    users = [arguments for instruction, arguments in instructions[stages[-1] :] if instruction == "USER"]
    assert len(stages) > 1
    assert users
    assert users[-1] not in ("root", "0")


def test_what_the_image_copies_exists_and_is_sent_to_the_builder() -> None:
    copied = [
        name.rstrip("/")
        for instruction, arguments in _dockerfile()
        if instruction == "COPY" and "--from" not in arguments
        for name in arguments.split()[:-1]
    ]
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    assert set(copied) == sent
    assert [name for name in copied if not (ROOT / name).exists()] == []
    # The wheel is built from what was copied: each package, and what pyproject.toml names.
    assert {"nanomoe", "service", "worker", "pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]} <= sent


def test_the_image_is_built_with_a_python_the_project_allows() -> None:
    versions = re.findall(r"^FROM python:(\d+\.\d+)", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    allowed = Requirement(f"python{PROJECT['requires-python']}").specifier
    assert versions
    assert all(version in allowed for version in versions)
    assert len(set(versions)) == 1


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_starts_a_module_that_exists(service: str) -> None:
    python, flag, module, *rest = SERVICES[service]["command"]
    assert (python, flag, rest) == ("python", "-m", [])
    assert importlib.util.find_spec(f"{module}.__main__")


@pytest.mark.parametrize("overlay", [{}, GPU["services"]["worker"]["environment"]])
@pytest.mark.parametrize("service", SERVICES)
def test_every_variable_is_a_setting_and_its_value_fits(
    service: str, overlay: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = _image_environment() | SERVICES[service]["environment"] | overlay
    given = {name: value for name, value in environment.items() if name.startswith("NANOMOE_")}
    assert {name.removeprefix("NANOMOE_").lower() for name in given} <= set(Settings.model_fields)
    for name, value in given.items():
        assert isinstance(value, str), f"{name}: compose wants the text {value!r} quoted"
        monkeypatch.setenv(name, value)
    Settings(_env_file=None)


def test_the_override_changes_services_that_exist() -> None:
    assert set(GPU["services"]) <= set(SERVICES)


def test_api_and_worker_share_the_data_folder() -> None:
    data = _image_environment()["NANOMOE_DATA_DIR"]
    volumes = {volume for service in SERVICES.values() for volume in service["volumes"]}
    assert volumes == {f"data:{data}"}
    assert "data" in COMPOSE["volumes"]
    assert ("VOLUME", data) in _dockerfile()
    assert all("NANOMOE_DATA_DIR" not in service["environment"] for service in SERVICES.values())


def test_the_port_is_one_and_published_on_loopback_only() -> None:
    port = SERVICES["api"]["environment"]["NANOMOE_PORT"]
    assert SERVICES["api"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert ("EXPOSE", port) in _dockerfile()
    assert f":{port}/healthz" in SERVICES["api"]["healthcheck"]["test"][-1]
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["api"]


def test_a_stopping_worker_has_time_to_write_a_checkpoint() -> None:
    timing = Timing()
    given = int(SERVICES["worker"]["stop_grace_period"].removesuffix("s"))
    assert given > timing.stop_grace + timing.exit_grace


@contextmanager
def _running(module: str, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", module], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=60)


def _healthy(service: str, environment: dict[str, str]) -> bool:
    """Whether the container's own health command is content, the port being the one of `environment`."""
    kind, python, *arguments = SERVICES[service]["healthcheck"]["test"]
    assert (kind, python) == ("CMD", "python")
    inside, here = SERVICES["api"]["environment"]["NANOMOE_PORT"], environment["NANOMOE_PORT"]
    command = [sys.executable, *(argument.replace(f":{inside}/", f":{here}/") for argument in arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True).returncode == 0


def test_the_health_commands_tell_a_running_service_from_none(tmp_path: Path) -> None:
    environment = os.environ | {"NANOMOE_DATA_DIR": str(tmp_path), "NANOMOE_DEVICE": "cpu", "NANOMOE_PORT": "0"}
    settings = Settings(_env_file=None, data_dir=tmp_path)
    environment["HTTP_PROXY"] = "http://127.0.0.1:9"  # nobody is there: the checks must not ask it
    with _running("service", environment) as api:
        assert api.stdout
        line = next((line for line in api.stdout if line.startswith("nanomoe listening on ")), "")
        environment["NANOMOE_PORT"] = line.strip().rpartition(":")[2]
        assert _healthy("api", environment)
        assert not _healthy("worker", environment)
        with _running("worker", environment) as worker, closing(open_database(settings)) as db:
            while not list_workers(db):
                assert worker.poll() is None
                db.changes.wait(0.1)
            assert _healthy("worker", environment)
            assert worker.poll() is None
        assert not _healthy("worker", environment)
    assert not _healthy("api", environment)


def test_the_example_environment_names_every_setting_with_its_default() -> None:
    assert ENV_EXAMPLE.read_text("utf-8") == env_example(), "make readme writes it"


def test_the_example_environment_can_be_used_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in default_settings():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    uncommented = re.sub(r"^#(?=NANOMOE_)", "", env_example(), flags=re.MULTILINE)
    (tmp_path / ".env").write_text(uncommented, "utf-8")
    here, default = Settings(), Settings(_env_file=None)
    assert here.database_url.replace(":///", f":///{tmp_path}/") == default.database_url
    assert here.model_dump(exclude={"database_url"}) == default.model_dump(exclude={"database_url"})


def test_every_dependency_is_pinned_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    pins = dict(line.split("==") for line in pinned)
    assert len(pins) == len(pinned), "a package is pinned twice"
    wanted = [Requirement(line) for line in PROJECT["dependencies"]]
    wanted += [Requirement(line) for extra in PROJECT["optional-dependencies"].values() for line in extra]
    seen: set[tuple[str, frozenset[str]]] = set()
    wrong = []
    while wanted:
        requirement = wanted.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        applies = requirement.marker is None or requirement.marker.evaluate()
        if name == PROJECT["name"] or not applies or (name, extras) in seen:
            continue
        seen.add((name, extras))
        if name not in pins or not requirement.specifier.contains(pins[name], prereleases=True):
            wrong.append(f"{requirement} is pinned to {pins.get(name)}")
        for line in () if name in NOT_INSTALLED else metadata.requires(name) or []:
            inner = Requirement(line)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras | {""}):
                inner.marker = None
                wanted.append(inner)
    assert wrong == []


def _comes_with(names: Iterable[str]) -> set[str]:
    """Distributions that are installed with these, and themselves; no extras."""
    found: set[str] = set()
    wanted = [canonicalize_name(name) for name in names]
    while wanted:
        name = wanted.pop()
        if name not in found:
            found.add(name)
            inner = map(Requirement, metadata.requires(name) or [])
            wanted += [canonicalize_name(r.name) for r in inner if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def undeclared(imported: Iterable[str], declared: Iterable[str]) -> set[str]:
    """Packages that are imported, and that an installation of the declared distributions would lack."""
    installed = _comes_with(declared)
    distributions = metadata.packages_distributions()
    return {
        package
        for package in imported
        if package not in sys.stdlib_module_names
        and installed.isdisjoint(map(canonicalize_name, distributions.get(package, [])))
    }


def test_whatever_is_imported_is_a_dependency_or_comes_with_one() -> None:
    ours = ("nanomoe", "service", "worker")
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *extras["postgres"], *extras["ray"], *extras["s3"], *extras["slurm"]]
    imported = {
        (name if isinstance(node, ast.Import) else str(node.module)).partition(".")[0]
        for path in tracked(*ours)
        if path.endswith(".py") and path != "nanomoe/assets/make_ptbr_8k.py"  # makes an asset, with the dev extra
        for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [alias.name for alias in node.names]
    }
    assert undeclared(imported - {*ours, *NOT_INSTALLED}, [Requirement(line).name for line in lines]) == set()


def test_the_check_sees_a_package_that_nobody_declared() -> None:
    assert undeclared({"sqlalchemy", "rich", "os"}, ["sqlmodel", "typer"]) == set()
    assert undeclared({"sqlalchemy", "rich"}, ["typer"]) == {"sqlalchemy"}


def test_the_wheel_carries_every_file_of_the_packages(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        carried = set(archive.namelist())
        (entry_points,) = (name for name in carried if name.endswith("entry_points.txt"))
        assert "nanomoe = service.cli:main" in archive.read(entry_points).decode()
    assert set(tracked("nanomoe", "service", "worker")) <= carried
    assert not any(name.startswith("tests/") for name in carried)
