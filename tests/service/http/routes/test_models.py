import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from nanomoe.import_messages import ImportRequest
from service.access.keys import create_key
from service.access.quotas import Quotas
from service.client import AsyncClient, Client, Problem
from service.errors import Unavailable
from service.storage import fsck, model_import, orphans
from tests.api import Api, Serve
from tests.buckets import Proxy, S3Server, failure
from tests.nanomoe.foreign_models import BLOCK_SIZE, SHAPE, gpt2, nanogpt_checkpoint, save_gpt2

TEXT = "Era uma vez um gato que dormia no sofá."


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gpt2(tmp_path_factory.mktemp("gpt2") / "model", gpt2())


def folders(api: Api) -> list[str]:
    jobs = api.context.settings.data_dir / "jobs"
    return sorted(str(path.relative_to(jobs)) for path in jobs.glob("*/*")) if jobs.is_dir() else []


def test_an_imported_model_generates_scores_is_inspected_and_is_started_from(api: Api, gpt2_folder: Path) -> None:
    with Client(api.url) as client:
        job = client.import_model(gpt2_folder, text=TEXT, tokenizer="mine", name="gpt2")
        assert (job.view.status, job.view.name, job.view.progress.percent) == ("succeeded", "gpt2", 100)
        assert "imported from a Hugging Face GPT-2 folder" in (job.view.status_reason or "")
        assert [event.kind for event in job.events()][-1] == "status"
        (checkpoint,) = job.checkpoints()
        assert checkpoint.percent == 100
        (figures,) = job.metrics().checkpoints
        assert job.text() == TEXT

        scored = job.score(TEXT)
        assert scored.loss == pytest.approx(figures.loss, rel=1e-5)
        assert len(job.generate("Era", max_new_tokens=5, temperature=0).choices) == 1
        assert job.inspect("Era uma").likeliest

        config = SHAPE | {"tokenizer": job.view.config.tokenizer, "block_size": 8, "epochs": 1}
        child = client.submit(TEXT, config | {"init_from": {"job_id": job.id}})
        assert child.view.parent is not None
        with pytest.raises(Problem, match="more than the parent's"):
            client.submit(TEXT, config | {"init_from": {"job_id": job.id}, "block_size": BLOCK_SIZE + 1})
    assert fsck.check(api.db, api.context.store).is_clean
    assert orphans.find_orphans(api.db, api.context.store) == []


def test_the_asynchronous_client_imports_a_nanogpt_checkpoint(api: Api, tmp_path: Path) -> None:
    torch.save(nanogpt_checkpoint(gpt2(), "_orig_mod."), tmp_path / "best.pt")

    async def imported() -> Any:
        async with AsyncClient(api.url) as client:
            return (await client.import_model(tmp_path / "best.pt", tokenizer="bytes", block_size=8)).view

    view = asyncio.run(imported())
    assert view.status_reason.startswith("imported from nanoGPT's ckpt.pt of step 2,000")
    assert (view.config.block_size, view.config.tokenizer, view.warnings) == (8, "bytes", [])


@pytest.mark.parametrize(
    ("files", "fields", "status", "code"),
    [
        ({"ckpt.pt": b"no checkpoint"}, {"tokenizer": "bytes"}, 422, "not_a_checkpoint"),
        ({"notes.txt": b"x"}, {}, 422, "not_a_checkpoint"),
        ({"a.pt": b"x", "b.pt": b"x"}, {}, 422, "invalid_request"),
        ({"ckpt.pt": b"x"}, {"block_size": "0"}, 422, "invalid_request"),
        ({}, {"tokenizer": "bytes"}, 422, "invalid_request"),
    ],
)
def test_what_cannot_be_imported_is_refused_and_leaves_nothing(
    api: Api, files: dict[str, bytes], fields: dict[str, str], status: int, code: str
) -> None:
    before = folders(api)
    parts = [("files", file) for file in files.items()]
    answer = api.http.post("/models", data=fields, files=parts)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert folders(api) == before


def test_a_model_is_imported_into_a_bucket_and_read_from_it(
    serve: Serve, gpt2_folder: Path, proxy: Proxy, s3_server: S3Server
) -> None:
    api = serve(store=f"s3://{s3_server.make_bucket()}/team")
    with Client(api.url, retries=0) as client:
        job = client.import_model(gpt2_folder, text=TEXT, tokenizer="mine")
        assert len(job.generate("Era", max_new_tokens=5, temperature=0).choices) == 1
        assert not any(path.is_file() for path in (api.context.settings.data_dir / "jobs").rglob("*"))
        assert fsck.check(api.db, api.context.store).is_clean
        proxy.decide = lambda _: failure("403 Forbidden", "AccessDenied")
        with pytest.raises(Problem) as refused:
            client.import_model(gpt2_folder, text=TEXT)
    assert (refused.value.status, refused.value.code) == (503, "store_refused")


def test_files_that_are_too_large_are_refused(serve: Serve, gpt2_folder: Path) -> None:
    with Client(serve(max_model_bytes=1000).url) as client, pytest.raises(Problem) as refused:
        client.import_model(gpt2_folder)
    assert (refused.value.status, refused.value.code) == (413, "model_too_large")


def test_an_import_beyond_the_quota_leaves_nothing(serve: Serve, gpt2_folder: Path) -> None:
    api = serve()
    made = create_key(api.db, "ana", "member", quotas=Quotas(bytes_stored=1))
    with Client(api.url, key=made.key) as client, pytest.raises(Problem) as refused:
        client.import_model(gpt2_folder, text=TEXT)
    assert (refused.value.status, refused.value.code) == (429, "quota_exceeded")
    assert folders(api) == []
    assert orphans.find_orphans(api.db, api.context.store) == []


def test_a_failure_between_files_and_row_leaves_an_orphan_and_no_job(
    serve: Serve, gpt2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise Unavailable("database_unavailable", "away")

    api = serve()
    monkeypatch.setattr("service.http.routes.models.submit.submit_finished_job", fail)
    with Client(api.url, retries=0) as client, pytest.raises(Problem):
        client.import_model(gpt2_folder)
    assert api.http.get("/jobs").json()["data"] == []
    assert len(folders(api)) == 1
    assert orphans.find_orphans(api.db, api.context.store)


def test_an_import_that_takes_too_long_is_killed_and_leaves_nothing(tmp_path: Path) -> None:
    request = ImportRequest(files=str(tmp_path), to=str(tmp_path / "f0-100"), text=TEXT)
    with pytest.raises(Unavailable, match="took longer than"):
        asyncio.run(model_import.run(request, seconds=0.01))
    assert list(tmp_path.iterdir()) == []
