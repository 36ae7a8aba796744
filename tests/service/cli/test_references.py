"""Jobs named on the command line by their name and by the beginning of their id."""

from uuid import uuid4

import pytest

from service.cli.references import Reference
from tests.api import Api
from tests.service.cli.conftest import Run


@pytest.fixture
def at(nanomoe: Run, api: Api, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line with the address of a running API in its environment."""
    monkeypatch.setenv("NANOMOE_URL", api.url)
    return nanomoe


def test_a_job_is_named_and_an_ambiguous_name_lists_the_jobs(api: Api, at: Run) -> None:
    name = f"meu@gato {uuid4().hex}"
    first = api.finished(name=name)
    assert at("metrics", f"{name}@100", "--json").json["job_id"] == first
    second = api.finished(name=name)
    done = at("delete", f"{name}@100", "--yes")
    assert (done.code, done.out) == (2, "")
    said, *listed = done.err.splitlines()
    assert said.startswith(f"nanomoe: ambiguous_job: '{name}' may mean 2 jobs; use an id: {second}, {first}")
    assert [line.split()[:2] for line in listed] == [[second, "succeeded"], [first, "succeeded"]]
    assert all(line.endswith(name) for line in listed)


def test_a_name_with_a_slash_is_found_although_no_path_holds_it(api: Api, at: Run) -> None:
    name = f"rato/rei {uuid4().hex}"
    job_id = api.finished(name=name)
    assert at("metrics", name, "--json").json["job_id"] == job_id
    assert "no job has the name 'a/b'" in at("metrics", "a/b").err
    api.finished(name=name)
    assert f"several jobs have the name '{name}'" in at("delete", name, "--yes").err


@pytest.mark.parametrize(
    ("given", "job", "checkpoint"),
    [
        ("gato", "gato", None),
        ("a@b@50", "a@b", 50),
        ("gato preto@latest", "gato preto", "latest"),
        ("0192@0%", "0192", 0),
    ],
)
def test_the_checkpoint_is_what_comes_after_the_last_at(given: str, job: str, checkpoint: object) -> None:
    assert Reference.parse(given) == Reference(job, checkpoint)  # type: ignore[arg-type]
