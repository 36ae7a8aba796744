"""What a fleet's workers are started with, and how its settings travel to other hosts."""

from pathlib import Path

import pytest

from service.engines.fleet import Fleet, environment_of
from service.settings import Settings, read_settings


def test_the_settings_arrive_whole_on_another_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("NANOMOE_LEASE_SECONDS=30\nNANOMOE_DEFAULT_QUOTAS=queued_jobs=5,running_jobs=2\n")
    monkeypatch.setenv("NANOMOE_ALLOW_HUB", "true")
    here = Settings()
    environment = environment_of(here, {"AWS_REGION": "eu", "NANOMOE_KEY": "secret", "HOME": "/root"})
    assert {name for name in environment if not name.startswith("NANOMOE_")} == {"AWS_REGION"}
    assert "NANOMOE_KEY" not in environment  # a client's
    monkeypatch.chdir("/")
    monkeypatch.delenv("NANOMOE_ALLOW_HUB")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert read_settings(_env_file=None) == here


def test_the_workers_of_a_host_have_devices_and_names_of_their_own() -> None:
    fleet = Fleet("many", 1, 2, cpus=4, slots=2, idle_seconds=90, environment={"NANOMOE_STORE": "s3://a"})
    assert [fleet.worker_arguments(index) for index in range(2)] == [
        ["--name", "many-0", "--slots", "2"],
        ["--name", "many-1", "--slots", "2", "--idle-seconds", "90"],
    ]
    assert fleet.worker_environment(1) == {
        "NANOMOE_STORE": "s3://a",
        "NANOMOE_DEVICE": "cpu:1",
        "OMP_NUM_THREADS": "2",
    }
    assert Fleet("many", 1, 1, gpus=2).worker_environment(0)["NANOMOE_DEVICE"] == "cuda:0,cuda:1"


def test_a_worker_is_another_where_anything_of_it_is() -> None:
    first = Fleet("many", 1, 4)
    assert first.fingerprint(1) == Fleet("many", 1, 8).fingerprint(1)
    others = [
        Fleet("many", 2, 4),
        Fleet("many", 1, 4, cpus=3),
        Fleet("many", 1, 4, gpus=1),
        Fleet("many", 1, 4, slots=2),
        Fleet("many", 1, 4, idle_seconds=1),
        Fleet("many", 1, 4, environment={"NANOMOE_STORE": "s3://b"}),
    ]
    assert len({fleet.fingerprint(1) for fleet in [first, *others]}) == 7


def test_a_password_is_in_no_text_of_a_fleet() -> None:
    assert "secret" not in repr(Fleet("many", 1, 1, environment={"NANOMOE_DATABASE_URL": "secret"}))
