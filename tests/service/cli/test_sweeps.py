"""`sweep`, `compare`, `presets` and `run` against the real API."""

import json
import threading
from pathlib import Path

import pytest

from nanomoe.config import JobConfig
from service.cli.knobs import grid_of
from service.cli.usage_error import UsageError
from service.jobs import queue, reads
from tests.api import TEXT, Api
from tests.service.cli.conftest import Run

TINY = ("--set", "tokenizer=bytes", "--set", "epochs=3")


@pytest.fixture
def at(nanomoe: Run, api: Api, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line with the address of a running API in its environment."""
    monkeypatch.setenv("NANOMOE_URL", api.url)
    return nanomoe


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "texto.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def test_a_grid_is_read_as_values_are() -> None:
    given = ["lr=1e-4,.005", "lr_schedule=constant,cosine", "bias=true,false", "betas=[0.9,0.95],[0.8,0.9]",
             "grad_clip=null,1", "tokenizer=bytes,train:300"]  # fmt: skip
    assert grid_of(JobConfig.model_fields, given) == {
        "lr": [1e-4, 0.005],
        "lr_schedule": ["constant", "cosine"],
        "bias": [True, False],
        "betas": [[0.9, 0.95], [0.8, 0.9]],
        "grad_clip": [None, 1],
        "tokenizer": ["bytes", "train:300"],
    }
    for wrong, said in (
        (["lr"], "lr=value,value"),
        (["lrr=1"], "did you mean 'lr'"),
        (["lr=1", "lr=2"], "given twice"),
    ):
        with pytest.raises(UsageError, match=said):
            grid_of(JobConfig.model_fields, wrong)


def test_sweep_says_what_it_submitted_and_how_to_compare(at: Run, text_file: str, api: Api) -> None:
    done = at("sweep", text_file, *TINY, "--grid", "lr=1e-4,5e-3", "-g", "n_embd=32,64", "--seeds", "3", "--name", "a")
    assert (done.code, done.err) == (0, "")
    (made,) = api.http.get("/sweeps?limit=1").json()["data"]
    assert done.out.splitlines() == [
        f"sweep {made['id']}  queued  a  12 jobs: lr 0.0001, 0.005; n_embd 32, 64; seed 42, 43, 44",
        f"compare its jobs: nanomoe compare --sweep {made['id']} --url {api.url}",
    ]
    queue.request_cancel_sweep(api.db, made["id"])


def test_a_dry_run_shows_the_sizes(at: Run, text_file: str, api: Api) -> None:
    before = api.http.get("/sweeps").json()
    done = at("sweep", text_file, *TINY, "-g", "n_layer=1,2", "--dry-run")
    assert done.code == 0
    assert done.out.startswith("2 jobs, 6 steps\njobs  parameters  steps")
    assert api.http.get("/sweeps").json() == before


def test_sweep_follows_its_jobs_and_compares_them(at: Run, text_file: str, api: Api) -> None:
    def work() -> None:
        while (claim := queue.claim(api.db, api.worker, 60)) is None:
            pass
        api.finish(claim, loss=0.25)
        for job in reads.list_jobs(api.db, status="queued"):
            queue.request_cancel(api.db, job.id)

    for options, code in (((), 1), (("--json",), 1)):
        worker = threading.Thread(target=work)
        worker.start()
        done = at("sweep", text_file, *TINY, "-g", "lr=1e-4,5e-3", "--watch", *options)
        worker.join()
        assert done.code == code
        if options:
            lines = [json.loads(line) for line in done.out.split("\n{\n")[0].splitlines()]
            assert {line["event"] for line in lines} == {"status", "checkpoint", "sweep"}
        else:
            _, first, second, header, *rows, best = done.out.splitlines()
            assert first.endswith("succeeded  loss 0.25")
            assert second.endswith("cancelled")
            assert header.split()[:4] == ["job", "status", "lr", "done"]
            assert [row.split()[1:5] for row in rows] == [
                ["succeeded", "0.0001", "100", "%"],
                ["cancelled", "0.005", "–", "–"],
            ]
            assert best.startswith("best loss: 0.25, job ")


def test_compare_shows_jobs_sweeps_and_tags(at: Run, api: Api) -> None:
    sweep_id = api.submit_finished_sweep()
    ids = api.http.get(f"/sweeps/{sweep_id}").json()["job_ids"]
    by_sweep = at("compare", "--sweep", sweep_id, "--perplexity", "8", "--at", "2")
    header, row, best = by_sweep.out.splitlines()
    assert header.split()[:3] == ["jobs", "done", "loss"]
    assert "2 ± 0" in row
    assert row.endswith("5 ± 0")
    assert best == f"best loss: 2, job {ids[0]} at 0 %"
    assert at("compare", "--sweep", "latest").out.splitlines()[-1] == best
    other = api.finished(config={"tokenizer": "bytes", "lr": 0.5}, tags={"c": "d"})
    by_name = at("compare", ids[0], "latest", "--metric", "accuracy").out.splitlines()
    assert [line.split()[0] for line in by_name[1:3]] == [ids[0], other]
    assert by_name[0].split() == ["job", "status", "lr", "done", "accuracy"]
    assert at("compare", "--tag", "c=d", "--json").json["jobs"][0]["job_id"] == other
    assert at("compare", "--tag", "c=d", "--csv", "-m", "loss").out.splitlines()[0].endswith("percent,step,loss")
    assert at("compare", "--tag", "nobody").out == "no jobs\n"


def test_what_cannot_be_compared_is_a_usage_error(at: Run, api: Api) -> None:
    job = api.submit()["id"]
    for arguments, said in (
        ((), "name one of sweep, tag and job"),
        (("0" * 32,), "job_not_found"),
        ((f"{job}@50",), "whole jobs are compared"),
        ((job, "--metric", "los"), "there is no metric 'los'"),
    ):
        done = at("compare", *arguments)
        assert (done.code, said in done.err) == (2, True), done.err


def test_the_experiments_are_listed_in_both_languages(at: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    english, portuguese = at("presets", "--lang", "en").out, at("presets", "--lang", "pt").out
    assert "what dropout slows down" in english
    assert "o que o dropout atrasa" in portuguese
    monkeypatch.setenv("LC_ALL", "pt_BR.UTF-8")
    assert at("presets").out == portuguese
    assert at("run", "nope").code == 2


def test_an_experiment_is_run(at: Run, api: Api) -> None:
    def work() -> None:
        while (claim := queue.claim(api.db, api.worker, 60)) is None:
            pass
        api.finish(claim, loss=0.25)

    for job in reads.list_jobs(api.db, status="queued"):
        queue.request_cancel(api.db, job.id)
    worker = threading.Thread(target=work)
    worker.start()
    done = at("run", "reference", "--lang", "en")
    worker.join()
    assert done.code == 0
    assert done.out.startswith("Watch the loss fall")
    assert "best loss: 0.25" in done.out
