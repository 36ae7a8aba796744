"""The checkpoint that jobs are to start from, looked up before they are submitted."""

from nanomoe import checkpoint
from nanomoe.checkpoint import CheckpointDamaged
from nanomoe.config import InitFrom
from service.errors import Conflict
from service.http import views
from service.http.context import Context
from service.jobs import reads
from service.jobs.references import find_job_id
from service.jobs.submission import Parent


def find_parent(service: Context, origin: InitFrom | None) -> Parent | None:
    """The recorded checkpoint `origin`; None for random weights.

    Raises:
        NotFound: `job_not_found`, `checkpoint_not_found`.
        Conflict: `checkpoint_damaged`, `ambiguous_job`.
        StoreError: its files cannot be read now.
    """
    if origin is None:
        return None
    job = reads.get_job(service.database, find_job_id(service.database, origin.job_id))
    recorded = reads.get_checkpoint(service.database, job.id, origin.checkpoint)
    try:
        opened = checkpoint.open(service.store / recorded.folder, recorded.manifest_sha256)
        tokenizer = opened.tokenizer()
    except CheckpointDamaged as error:
        raise Conflict(error.code, f"cannot start from {origin.job_id}@{origin.checkpoint}: {error}") from error
    return Parent(job.id, views.job(job).config, tokenizer, job.text_sha256)
