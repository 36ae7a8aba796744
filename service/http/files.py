"""A job's files: served completely or in ranges, and removed with the job."""

import base64
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path

import structlog
from anyio import to_thread
from fastapi.responses import FileResponse
from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from nanomoe.store.local import LocalStore
from nanomoe.store.store import Store, StoreError
from service.errors import Conflict, NotFound
from service.http import conditional, problems
from service.http.head import IS_HEAD
from service.jobs.tables import Checkpoint
from service.storage.job_folders import job_folder

log = structlog.get_logger(__name__)

_MEDIA_TYPE = "application/octet-stream"
SIGNED_SECONDS = 300.0
"""How long a client can begin to read a file at the URL that it was redirected to."""

_AT_ONCE = 8
"""Folders of a bucket that are removed at the same time."""


def remove_jobs(job_ids: Sequence[str], store: Store, data_dir: Path) -> None:
    """Remove the folders of jobs that are no longer in the database. A file that cannot be removed now is removed later
    as an orphan."""
    for job_id in job_ids:
        _remove_local(data_dir / job_folder(job_id))
    if store.is_local:
        return
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="removal") as pool:
        removing = [pool.submit((store / job_folder(job_id)).remove) for job_id in job_ids]
        try:
            for removed in removing:
                removed.result()
        except StoreError as error:
            log.warning("files_not_removed", jobs=len(job_ids), reason=str(error))
            pool.shutdown(cancel_futures=True)


def _remove_local(folder: Path) -> None:
    def warn(function: object, path: str, error: BaseException) -> None:
        if not isinstance(error, FileNotFoundError):
            log.warning("file_not_removed", path=path, reason=str(error))

    shutil.rmtree(folder, onerror=lambda function, path, info: warn(function, path, info[1]))


def recorded_file(row: Checkpoint, name: str, store: Store, *, redirects: bool) -> Response:
    """The file `name` of a checkpoint, as an answer that supports ranges and preconditions. `redirects`: whether a
    client is sent to the bucket for it.

    Raises:
        NotFound: `file_not_found`: the checkpoint has no such file.
        Conflict: `checkpoint_damaged`: the recorded file is missing, or has another size.
        StoreError: it cannot be read now.
    """
    recorded = next((file for file in row.files if file["name"] == name), None)
    if recorded is None:
        raise NotFound("file_not_found", f"checkpoint {row.percent} of job {row.job_id} has no file {name!r}")
    folder = store / row.folder
    try:
        found = folder.stat(name)
    except FileNotFoundError:
        found = None
    if found is None or found.size != recorded["size"]:
        raise Conflict("checkpoint_damaged", f"{name} of checkpoint {row.percent} differs from what was recorded")
    digest = base64.b64encode(bytes.fromhex(recorded["sha256"])).decode()
    headers = {
        "ETag": f'"{recorded["sha256"]}"',
        "Repr-Digest": f"sha-256=:{digest}:",
        # `latest` stands for another checkpoint later.
        "Cache-Control": "no-cache",
        "Last-Modified": formatdate(found.changed_at, usegmt=True),
    }
    if isinstance(folder, LocalStore):
        path = folder.folder / name
        return LocalFile(path, headers=headers, media_type=_MEDIA_TYPE, filename=name, stat_result=path.stat())
    return BucketFile(folder, name, found.size, headers, redirects=redirects)


class LocalFile(FileResponse):
    """A file of this machine, in ranges if asked for; a range outside of it is a 416 problem."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the complete file, the ranges inside of it, or the response that preconditions demand."""
        answer, ranges = _evaluate(scope, self.headers, int(self.headers["content-length"]))
        if answer is not None:
            await answer(scope, receive, send)
            return
        # Only valid ranges are passed on: Starlette would refuse unknown units, and all ranges for one bad one.
        headers = [(name, value) for name, value in scope["headers"] if name not in (b"range", b"if-range")]
        if ranges:
            wanted = ",".join(f"{first}-{last}" for first, last in ranges)
            headers.append((b"range", f"bytes={wanted}".encode()))
        await super().__call__({**scope, "headers": headers}, receive, send)


class BucketFile(Response):
    """A file of a bucket, as `LocalFile` is one of this machine."""

    media_type = _MEDIA_TYPE

    def __init__(self, folder: Store, name: str, size: int, headers: Mapping[str, str], *, redirects: bool) -> None:
        super().__init__(
            headers={
                **headers,
                "Content-Length": str(size),
                "Content-Disposition": f'attachment; filename="{name}"',
                "Accept-Ranges": "bytes",
            }
        )
        self._folder, self._name, self._size, self._redirects = folder, name, size, redirects

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the complete file, the ranges inside of it, a redirect, or the response that preconditions demand."""
        answer, ranges = _evaluate(scope, self.headers, self._size)
        if answer is None and scope.get(IS_HEAD):
            await super().__call__(scope, receive, send)
            return
        if answer is None and self._redirects and _may_be_sent_elsewhere(scope, ranges):
            answer = await to_thread.run_sync(self._redirect)
        elif answer is None:
            answer = await to_thread.run_sync(self._answer, _merged(ranges or []))
        await answer(scope, receive, send)

    def _redirect(self) -> Response:
        """A redirect to where the bucket itself sends the file. Raises StoreError."""
        url = self._folder.signed_url(self._name, SIGNED_SECONDS)
        assert url is not None, "a bucket signs URLs"
        kept = {name: self.headers[name] for name in ("etag", "repr-digest", "cache-control", "last-modified")}
        return Response(status_code=307, headers={**kept, "Location": url})

    def _answer(self, ranges: Sequence[tuple[int, int]]) -> Response:
        """The file from the store, or these ranges of it. Raises StoreError."""
        headers = dict(self.headers)
        if not ranges:
            return StreamingResponse(self._folder.pieces(self._name), headers=headers)
        if len(ranges) == 1:
            ((first, last),) = ranges
            headers |= {"content-length": str(last + 1 - first), "content-range": f"bytes {first}-{last}/{self._size}"}
            return StreamingResponse(self._folder.pieces(self._name, first, last), 206, headers)
        boundary = secrets.token_hex(13)
        heads = [
            f"--{boundary}\r\nContent-Type: {_MEDIA_TYPE}\r\nContent-Range: bytes {first}-{last}/{self._size}\r\n\r\n"
            for first, last in ranges
        ]
        end = f"--{boundary}--\r\n"
        length = sum(map(len, heads)) + sum(last + 1 - first + 2 for first, last in ranges) + len(end)
        headers |= {"content-length": str(length), "content-type": f"multipart/byteranges; boundary={boundary}"}

        def parts() -> Iterator[bytes]:
            for head, (first, last) in zip(heads, ranges, strict=True):
                yield head.encode()
                yield from self._folder.pieces(self._name, first, last)
                yield b"\r\n"
            yield end.encode()

        return StreamingResponse(parts(), 206, headers)


def _evaluate(scope: Scope, headers: Headers, size: int) -> tuple[Response | None, list[tuple[int, int]] | None]:
    """The answer that preconditions or an impossible range demand, and else the ranges that are asked for."""
    if (answer := conditional.evaluate_preconditions(scope, headers)) is not None:
        return answer, None
    ranges = conditional.wanted_ranges(scope, headers, size)
    if ranges != []:
        return None, ranges
    problem = problems.respond(
        scope["path"],
        416,
        "range_not_satisfiable",
        f"the range cannot be read, or lies outside of the {size} bytes",
        headers={"Content-Range": f"bytes */{size}"},
    )
    return problem, None


def _may_be_sent_elsewhere(scope: Scope, ranges: Sequence[tuple[int, int]] | None) -> bool:
    """Whether the bucket would answer a request as this service does: it knows the file by another entity tag, and
    sends one range at most."""
    asked = Headers(scope=scope)
    return len(ranges or ()) <= 1 and not any(name in asked for name in ("if-match", "if-range"))


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges in ascending order, each byte once: nobody makes the service read a file many times at one request."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged
