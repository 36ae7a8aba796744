"""Files of another program's weights, turned into a checkpoint in the store by a process of its own.

What is sent lies in the data folder, in that of a job that has no row yet, and the checkpoint is written beside it, or
into a bucket: whatever a killed API leaves there is swept as any other orphan. This process loads no torch and reads
none of the files.
"""

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import structlog
from pydantic import TypeAdapter

from nanomoe.import_messages import MODEL_FILES, Imported, ImportRequest, Refused
from nanomoe.store.local import UNFINISHED
from nanomoe.store.opening import open_store
from nanomoe.store.store import StoreRefused, StoreUnavailable
from service.errors import Invalid, StorageFull, TooLarge, Unavailable, store_out_of_reach
from service.storage.job_folders import job_folder

log = structlog.get_logger(__name__)

IMPORT_SECONDS = 600.0
"""After which an import is given up, and its process killed."""

_STAGED = f"files{UNFINISHED}"
_ANSWER: TypeAdapter[Imported | Refused] = TypeAdapter(Imported | Refused)


@contextlib.contextmanager
def staged(data_dir: Path, job_id: str) -> Iterator[Path]:
    """A folder for what is sent, removed at the end; and the job's folder with it, if nothing else came into it."""
    folder = data_dir / job_folder(job_id)
    files = folder / _STAGED / "files"
    files.mkdir(parents=True)
    try:
        yield files
    finally:
        shutil.rmtree(folder / _STAGED, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


def staged_name(given: str | None) -> str:
    """The name under which a sent file is kept. Raises Invalid `not_a_checkpoint` for one that no import reads."""
    name = (given or "").replace("\\", "/").rpartition("/")[2]
    if name.endswith(".pt"):
        return MODEL_FILES[0]
    if name not in MODEL_FILES:
        raise Invalid("not_a_checkpoint", f"{name!r} is none of *.pt, {', '.join(MODEL_FILES[1:])}")
    return name


async def run(request: ImportRequest, seconds: float = IMPORT_SECONDS) -> Imported:
    """Write the checkpoint, in a process that ends with this one.

    Raises:
        Invalid: the files cannot be imported; the code is `NotImportable`'s, or a tokenizer's, or the text's.
        TooLarge: `model_too_large`.
        StorageFull: the disk of the data folder is full.
        Unavailable: `import_failed`: the process ended without an answer, or took longer than `seconds`;
            `store_unavailable`, `store_refused`: the bucket cannot be written to now.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "nanomoe.importing",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=os.environ if request.allow_hub else os.environ | {"HF_HUB_OFFLINE": "1"},
        start_new_session=True,  # the API handles Ctrl-C
    )
    line = request.model_copy(update={"parent": os.getpid()}).model_dump_json().encode() + b"\n"
    try:
        async with asyncio.timeout(seconds):
            output, _ = await process.communicate(line)
    except TimeoutError:
        raise Unavailable("import_failed", f"the import took longer than {seconds:g} seconds") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        # Whoever was killed in the middle of it has left an unfinished folder; in a bucket it has no manifest, and is
        # swept.
        if (to := open_store(request.to)).is_local:
            shutil.rmtree(to.location + UNFINISHED, ignore_errors=True)
    if process.returncode != 0:
        log.error("import_failed", status=process.returncode)
        raise Unavailable("import_failed", f"the process that reads the files ended with status {process.returncode}")
    answer = _ANSWER.validate_json(output)
    if isinstance(answer, Imported):
        return answer
    if answer.code == "storage_full":
        raise StorageFull(answer.message)
    if answer.code in (StoreUnavailable.code, StoreRefused.code):
        log.error("import_failed", reason=answer.message)
        raise store_out_of_reach(answer.code)
    if answer.code == "model_too_large":
        raise TooLarge(answer.code, answer.message)
    raise Invalid(answer.code, answer.message)
