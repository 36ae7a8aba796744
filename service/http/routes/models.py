"""Weights of other programs, brought in as a finished job."""

import shutil
from importlib.resources import files as resources
from pathlib import Path
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Response, UploadFile
from fastapi import Form as FormParameter
from pydantic import BaseModel, ConfigDict, Field

from nanomoe.import_messages import Imported, ImportRequest
from service.errors import Invalid, QuotaExceeded, TooLarge
from service.http import views
from service.http.files import remove_jobs
from service.http.openapi import problems
from service.http.patterns import PRINTABLE
from service.http.routes.parameters import Service
from service.http.schemas import JobView
from service.http.schemas.jobs import JobName
from service.jobs import submit
from service.jobs.ids import new_id
from service.jobs.new_job import NewJob
from service.storage import model_import
from service.storage.job_folders import checkpoint_folder

router = APIRouter(tags=["jobs"])

_PERCENT = 100


class ImportRequestForm(BaseModel):
    """The body of `POST /models`, a form."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    files: list[UploadFile] = Field(min_length=1)
    """Files of the model: nanoGPT's `ckpt.pt`; or `config.json` and `model.safetensors` of a Hugging Face GPT-2. Beside
    them those of the tokenizer: `tokenizer.json`, or `vocab.json` and `merges.txt`."""

    tokenizer: str = Field("gpt2", min_length=1, max_length=200, pattern=PRINTABLE)
    """Name of the tokenizer, as in a job's config. Where the files hold one, it is that, and this is what it is
    called."""

    block_size: int | None = Field(None, ge=1)
    """Tokens to crop the context to; null keeps the model's own."""

    text: str | None = Field(None, min_length=1)
    """Text that the checkpoint's figures are measured on, at most 1 MiB; null is the bundled paragraph."""

    name: JobName | None = None
    """Name of the job, shown in lists."""


Form = Annotated[ImportRequestForm, FormParameter(media_type="multipart/form-data")]


@router.post(
    "/models",
    summary="Import a model of another program",
    response_description="The finished job, with one checkpoint at percent 100.",
    status_code=201,
    responses=problems(400, 413, 415, 422, 503, 507),
)
async def import_model(service: Service, response: Response, form: Form) -> JobView:
    """Bring in weights that nanoGPT or transformers trained, as a job that has succeeded: generate, score, inspect and
    `init_from` work on it. A model that would compute something else here is refused.

    The job's text is what its figures are measured on, not what the weights were trained on.
    """
    files, text = form.files, form.text or _paragraph()
    settings, job_id = service.settings, new_id()
    if len(text.encode()) > settings.max_text_bytes:
        raise TooLarge("text_too_large", f"the text has more than {settings.max_text_bytes:,} bytes")
    if sum(file.size or 0 for file in files) > settings.max_model_bytes:
        raise TooLarge("model_too_large", f"the files have more than {settings.max_model_bytes:,} bytes")
    folder = checkpoint_folder(job_id, 0, _PERCENT)
    async with service.importing:
        with model_import.staged(settings.data_dir, job_id) as stage:
            for file in files:
                await _keep(file, stage)
            request = ImportRequest(
                files=str(stage),
                to=(service.store / folder).location,
                text=text,
                tokenizer=form.tokenizer,
                block_size=form.block_size,
                allow_hub=settings.allow_hub,
                tokenizer_dir=None if settings.tokenizer_dir is None else str(settings.tokenizer_dir),
                max_params=settings.max_params,
            )
            imported = await model_import.run(request)
    # Should this fail, the files stay and are swept as orphans: a commit whose outcome is unknown may have a row. A
    # refusal is known, and who is refused must not fill the disk all the same.
    try:
        row = await to_thread.run_sync(_record, service, job_id, folder, text, form.name, imported)
    except QuotaExceeded:
        await to_thread.run_sync(remove_jobs, [job_id], service.store, settings.data_dir)
        raise
    response.headers["Location"] = f"/jobs/{job_id}"
    return row


def _record(service: Service, job_id: str, folder: str, text: str, name: str | None, imported: Imported) -> JobView:
    new = NewJob(
        text=text,
        config=imported.config,
        name=name,
        n_tokens=imported.n_tokens,
        n_params=imported.n_params,
        n_active_params=imported.n_active_params,
        warnings=[warning.model_dump(mode="json") for warning in imported.warnings],
    )
    row = submit.submit_finished_job(
        service.database,
        new,
        job_id=job_id,
        reason=f"imported from {imported.origin}; figures are of the text given here, not of the one trained on, and "
        "the training knobs of its config were not used",
        folder=folder,
        manifest_sha256=imported.manifest_sha256,
        files=imported.files,
        metrics=imported.metrics,
    )
    return views.job(row)


async def _keep(file: UploadFile, stage: Path) -> None:
    """Copy a sent file into the folder, under the name that the import knows."""
    to = stage / model_import.staged_name(file.filename)
    if to.exists():
        raise Invalid("invalid_request", f"{to.name} is sent twice")

    def copy() -> None:
        with to.open("wb") as kept:
            shutil.copyfileobj(file.file, kept, 1 << 20)

    await to_thread.run_sync(copy)


def _paragraph() -> str:
    return resources("nanomoe").joinpath("assets", "paragraph.pt.txt").read_text(encoding="utf-8").strip()
