"""`/static`: the files of the page and of the documentation in the browser. Knows no route."""

import os
from functools import lru_cache
from pathlib import Path

from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from service.http.compressed import CompressedContent

STATIC = Path(__file__).parents[1] / "static"
"""The folder of what a browser loads."""

# Not from the system's table: a machine on which `.mjs` has no entry, or `.js` a wrong one, would show an empty page.
_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}
_TEXT = "text/plain; charset=utf-8"


# A wheel gives all files of every version the same time: only the content tells two versions apart.
@lru_cache(maxsize=256)
def _read(path: Path, modified_ns: int, size: int) -> CompressedContent:
    return CompressedContent(path.read_bytes(), _MEDIA_TYPES.get(path.suffix, _TEXT))


class PageFiles(StaticFiles):
    """The files of `STATIC`, held in memory once asked for."""

    def __init__(self) -> None:
        super().__init__(directory=STATIC)

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        """The file's content, with gzip where the client accepts it."""
        return _read(Path(full_path), stat_result.st_mtime_ns, stat_result.st_size).respond(scope)
