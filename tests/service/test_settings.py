"""Settings come from the environment and from `.env`, and a wrong one is named."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from service.errors import StartRefused
from service.settings import Settings, read_settings


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # away from a developer's own .env


def test_the_defaults_need_no_server_and_no_network(tmp_path: Path) -> None:
    settings = Settings()
    assert settings.data_dir == tmp_path / "data"
    assert settings.database_url == f"sqlite:///{tmp_path}/data/nanomoe.db"
    assert (settings.host, settings.port, settings.allow_hub, settings.tokenizer_dir) == (
        "127.0.0.1",
        8000,
        False,
        None,
    )


def test_the_environment_overrides_the_file_and_an_argument_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("NANOMOE_PORT=1111\nNANOMOE_HOST=localhost\nOTHER=1\n")
    monkeypatch.setenv("NANOMOE_PORT", "2222")
    assert (Settings().port, Settings().host, Settings(port=3333).port) == (2222, "localhost", 3333)


def test_the_database_lies_in_the_data_folder_wherever_that_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOMOE_DATA_DIR", "elsewhere")
    assert Settings().database_url == f"sqlite:///{tmp_path}/elsewhere/nanomoe.db"


def test_heartbeat_and_rescue_intervals_follow_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Settings().lease_seconds, Settings().heartbeat_seconds, Settings().rescue_seconds) == (60, 10, 15)
    monkeypatch.setenv("NANOMOE_LEASE_SECONDS", "3")
    assert (Settings().heartbeat_seconds, Settings().rescue_seconds) == (0.5, 0.75)


def test_a_cohort_is_a_number_or_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOMOE_COHORT", raising=False)
    assert Settings().cohort == "auto"
    for given, read in (("auto", "auto"), ("64", 64)):
        monkeypatch.setenv("NANOMOE_COHORT", given)
        assert Settings().cohort == read


def test_hosts_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOMOE_ALLOWED_HOSTS", "a.example, b.example,")
    assert Settings().allowed_hosts == ("a.example", "b.example")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "70000"),
        ("PORT", "http"),
        ("COHORT", "0"),
        ("COHORT", "many"),
        ("LEASE_SECONDS", "0"),
        ("LEASE_SECONDS", "nan"),
        ("SNAPSHOT_SECONDS", "inf"),
        ("HEARTBEAT_SECONDS", "21"),
        ("DATABASE_URL", "mysql://localhost/x"),
        ("ALLOW_HUB", "perhaps"),
        ("MAX_TEXT_BYTES", "0"),
        ("STORE", "data"),
        ("STORE", "s3://"),
        ("STORE", "s3://Team/x"),
        ("STORE", "s3://team//x"),
        ("STORE", "s3://team/a?b"),
        ("DOWNLOADS", "redirect"),  # without a bucket
    ],
)
def test_a_wrong_value_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"NANOMOE_{name}", value)
    with pytest.raises(ValidationError) as refused:
        Settings()
    assert refused.value.errors()[0]["loc"] == (name.lower(),)


@pytest.mark.parametrize(
    ("given", "store"), [("", None), ("s3://team", "s3://team"), ("s3://team/a/b.c_d-e/", "s3://team/a/b.c_d-e")]
)
def test_a_store_is_a_bucket_and_a_prefix(monkeypatch: pytest.MonkeyPatch, given: str, store: str | None) -> None:
    monkeypatch.setenv("NANOMOE_STORE", given)
    assert Settings().store == store
    if store is not None:
        monkeypatch.setenv("NANOMOE_DOWNLOADS", "redirect")
        assert Settings().downloads == "redirect"


def test_every_setting_is_described() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_the_home_folder_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "h%me"))
    for name, value in {
        "DATA_DIR": "~/data",
        "LOCK_DIR": "~/locks",
        "TOKENIZER_DIR": "~/tok",
        "DATABASE_URL": "sqlite:///~/a%3Fb.db?x=1",
    }.items():
        monkeypatch.setenv(f"NANOMOE_{name}", value)
    settings = Settings()
    assert (settings.data_dir, settings.tokenizer_dir) == (tmp_path / "h%me/data", tmp_path / "h%me/tok")
    assert settings.lock_dir == tmp_path / "h%me/locks"
    assert settings.database_url == f"sqlite:///{tmp_path}/h%25me/a%3Fb.db?x=1"
    paths = [name for name, field in Settings.model_fields.items() if "Path" in str(field.annotation)]
    assert paths == ["data_dir", "lock_dir", "tokenizer_dir"], "another path: see that it is expanded"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("DATA_DIR", "~nobody-here/x", "NANOMOE_DATA_DIR: there is no user of ~nobody-here; a folder of that name is"),
        ("DATA_DIR", "ol\udce1", r"NANOMOE_DATA_DIR: must be UTF-8, and holds '\\udce1'"),
        ("HOST", "ol\udce1", r"NANOMOE_HOST: must be UTF-8, and holds '\\udce1'"),
        ("DATABASE_URL", "sqlite:///ol\udce1", r"NANOMOE_DATABASE_URL: must be UTF-8, and holds '\\udce1'"),
        ("PORT", "http", "NANOMOE_PORT: Input should be a valid integer"),
    ],
)
def test_every_fault_of_the_settings_is_one_line(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"NANOMOE_{name}", value)
    with pytest.raises(StartRefused) as refused:
        read_settings()
    assert str(refused.value).startswith(said.replace("\\\\", "\\"))
    assert "\n" not in str(refused.value)


def test_a_file_of_settings_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes("NANOMOE_DATA_DIR=olá".encode("latin-1"))
    with pytest.raises(StartRefused, match=r"^\.env is not UTF-8: byte 19 is 0xe1$"):
        read_settings()
