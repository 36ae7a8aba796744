"""`sweep`, `compare`, `presets` and `run` against the real API."""

import json
import threading
from pathlib import Path

import pytest

from nanomoe.config import JobConfig
from service.cli.knobs import grid_of
from service.cli.sweeps import _show_estimate
from service.cli.usage_error import UsageError
from service.http.schemas import SweepCohorts, SweepEstimate
from service.jobs import queue, reads
from tests.api import Api
from tests.service.cli.conftest import TINY, Run


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
    assert done.out.endswith("together: not known, no worker with the memory for all of them is running\n")
    assert api.http.get("/sweeps").json() == before


@pytest.mark.parametrize(
    ("cohorts", "seconds", "alone", "time", "told"),
    [
        ({4: 2, 1: 1}, 30.0, 90.0, ", about 30.0 s (1 min 30 s if each is trained alone)", "2 x 4 jobs, 1 alone"),
        ({4: 2}, None, 90.0, ", about 1 min 30 s if each is trained alone", "2 x 4 jobs"),
        ({4: 2}, 30.0, None, ", about 30.0 s", "2 x 4 jobs"),
        ({1: 3}, 90.0, 90.0, ", about 1 min 30 s", "none, each job is trained alone"),
    ],
)
def test_a_dry_run_says_what_is_trained_together(
    cohorts: dict[int, int],
    seconds: float | None,
    alone: float | None,
    time: str,
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    estimate = SweepEstimate(
        n_jobs=9,
        parameters=[],
        shapes=[],
        training_bytes=None,
        total_steps=None,
        cohorts=[SweepCohorts(n_jobs=size, n_cohorts=n) for size, n in cohorts.items()],
        predicted_seconds=seconds,
        predicted_alone_seconds=alone,
        warnings=[],
    )
    _show_estimate(estimate, as_json=False)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert (first, last) == (f"9 jobs{time}", f"together: {told}")


def test_sweep_follows_its_jobs_and_compares_them(at: Run, text_file: str, api: Api) -> None:
    def work() -> None:
        api.train_queued(0.25)
        for job in reads.list_jobs(api.db, reads.JobFilter(status="queued")):
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
    with_curves = at("compare", "--sweep", sweep_id, "--curves").out.splitlines()
    assert "train_loss by step" in with_curves
    assert with_curves[-1].endswith("mean of 2 jobs: 3.3333 at step 3")
    assert at("compare", "--tag", "nobody", "--curves").out == "no jobs\n"


def test_compare_writes_one_file(at: Run, api: Api, tmp_path: Path) -> None:
    job = api.finished(config={"tokenizer": "bytes"}, name="um")
    file = tmp_path / "comparison.html"
    done = at("compare", job, "--html", str(file), "--lang", "pt")
    assert (done.code, done.out, done.err) == (0, "", f"wrote {file}\n")
    assert "Perda de treino por passo" in file.read_text("utf-8")


def test_continuations_are_shown_where_their_sampling_varies(at: Run, api: Api) -> None:
    sweep_id = api.submit_finished_sweep(points=[{"cont_prefix_tokens": 3}, {"cont_prefix_tokens": 10}])
    shown = at("compare", "--sweep", sweep_id).out.splitlines()
    first = shown.index("cont_prefix_tokens 3")
    assert [line.split() for line in shown[first + 1 : first + 3]] == [["0", "%", "abc│def"], ["100", "%", "abc│def"]]
    assert "cont_prefix_tokens 10" in shown


def test_a_sweep_is_listed_and_changed_by_its_name(at: Run, text_file: str) -> None:
    at("sweep", text_file, *TINY, "-g", "lr=1e-4,5e-3", "--name", "taxas")
    _, newest = at("sweeps", "--limit", "1").out.splitlines()
    assert newest.split()[1:4] == ["queued", "0", "2"]
    assert newest.endswith("taxas  lr 0.0001, 0.005")
    for command, status in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        done = at(command, "--sweep", "taxas")
        assert (done.code, done.out.split()[2:4]) == (0, [status, "taxas"]), done.err
    for arguments in ((), ("latest", "--sweep", "latest")):
        assert "name a job, or a sweep with --sweep" in at("cancel", *arguments).err
    assert at("delete", "--sweep", "latest", "--json").json["deleted"] == newest.split()[0]
    gone = at("delete", "--sweep", "taxas")
    assert (gone.code, gone.err) == (2, "nanomoe: sweep_not_found: there is no sweep 'taxas'\n")


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
    for job in reads.list_jobs(api.db, reads.JobFilter(status="queued")):
        queue.request_cancel(api.db, job.id)
    worker = threading.Thread(target=api.train_queued, args=[0.5, 0.25, 0.5])
    worker.start()
    done = at("run", "reference", "--lang", "en")
    worker.join()
    assert done.code == 0
    assert done.out.startswith("Watch the loss fall")
    assert "best loss: 0.25" in done.out
