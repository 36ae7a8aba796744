"""Content that is kept in memory both plain and compressed, and revalidated by its hash. Knows no route and no file."""

import gzip
import hashlib
from dataclasses import dataclass, field
from functools import cached_property

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

from service.http.conditional import ConditionalResponse


@dataclass(frozen=True)
class CompressedContent:
    """Content of one version, the same for everybody."""

    plain: bytes = field(repr=False)
    media_type: str

    @cached_property
    def _gzip(self) -> bytes:
        return gzip.compress(self.plain, 9, mtime=0)

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(self.plain).hexdigest()[:32]

    def respond(self, scope: Scope) -> Response:
        """The full response to a request, with gzip where the client accepts it, or 304 where it has the content."""
        is_accepted = "gzip" in Headers(scope=scope).get("accept-encoding", "")
        headers = {
            "ETag": f'"{self._digest}{"-gzip" if is_accepted else ""}"',
            "Cache-Control": "no-cache",
            "Vary": "Accept-Encoding",
            "X-Content-Type-Options": "nosniff",
        } | ({"Content-Encoding": "gzip"} if is_accepted else {})
        return ConditionalResponse(self._gzip if is_accepted else self.plain, 200, headers, self.media_type)
