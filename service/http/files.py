"""A job's files: served completely or in ranges, and removed with the job."""

import base64
import shutil
from pathlib import Path
from typing import Self

import structlog
from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send

from service.errors import Conflict, NotFound
from service.http import conditional, problems
from service.jobs.tables import Checkpoint
from service.storage.job_folders import job_folder

log = structlog.get_logger(__name__)


def remove_job(job_id: str, data_dir: Path) -> None:
    """Remove the folder of a job that is no longer in the database. A file that cannot be removed now is removed later
    as an orphan."""

    def warn(function: object, path: str, error: BaseException) -> None:
        if not isinstance(error, FileNotFoundError):
            log.warning("file_not_removed", path=path, reason=str(error))

    shutil.rmtree(data_dir / job_folder(job_id), onerror=lambda function, path, info: warn(function, path, info[1]))


class RecordedFile(FileResponse):
    """A file response that supports ranges and preconditions; a range outside of the file is a 416 problem."""

    @classmethod
    def of(cls, row: Checkpoint, name: str, data_dir: Path) -> Self:
        """The file `name` of a checkpoint.

        Raises:
            NotFound: `file_not_found`: the checkpoint has no such file.
            Conflict: `checkpoint_damaged`: the recorded file is missing, or has another size.
        """
        recorded = next((file for file in row.files if file["name"] == name), None)
        if recorded is None:
            raise NotFound("file_not_found", f"checkpoint {row.percent} of job {row.job_id} has no file {name!r}")
        path = data_dir / row.folder / name
        if not path.is_file() or (found := path.stat()).st_size != recorded["size"]:
            raise Conflict("checkpoint_damaged", f"{name} of checkpoint {row.percent} differs from what was recorded")
        digest = base64.b64encode(bytes.fromhex(recorded["sha256"])).decode()
        headers = {
            "ETag": f'"{recorded["sha256"]}"',
            "Repr-Digest": f"sha-256=:{digest}:",
            # `latest` stands for another checkpoint later.
            "Cache-Control": "no-cache",
        }
        return cls(path, headers=headers, media_type="application/octet-stream", filename=name, stat_result=found)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the complete file, the ranges inside of it, or the response that preconditions demand."""
        if (answer := conditional.evaluate_preconditions(scope, self.headers)) is not None:
            await answer(scope, receive, send)
            return
        size = int(self.headers["content-length"])
        ranges = conditional.wanted_ranges(scope, self.headers, size)
        if ranges == []:
            problem = problems.respond(
                scope["path"],
                416,
                "range_not_satisfiable",
                f"the range cannot be read, or lies outside of the {size} bytes",
                headers={"Content-Range": f"bytes */{size}"},
            )
            await problem(scope, receive, send)
            return
        # Only valid ranges are passed on: Starlette would refuse unknown units, and all ranges for one bad one.
        headers = [(name, value) for name, value in scope["headers"] if name not in (b"range", b"if-range")]
        if ranges:
            wanted = ",".join(f"{first}-{last}" for first, last in ranges)
            headers.append((b"range", f"bytes={wanted}".encode()))
        await super().__call__({**scope, "headers": headers}, receive, send)
