"""The page: one document at every address under `/page`, to which `/` leads. Its files lie under `/static`."""

import base64
import hashlib
import re
from functools import cache
from typing import NamedTuple

from fastapi import APIRouter
from fastapi.responses import RedirectResponse, Response

from service.http.conditional import ConditionalResponse
from service.http.static_files import STATIC

router = APIRouter(include_in_schema=False)

_IMPORT_MAP = re.compile(r'<script type="importmap">(.*?)</script>', re.DOTALL)


class _Document(NamedTuple):
    html: bytes
    headers: dict[str, str]


@cache
def _document() -> _Document:
    html = (STATIC / "index.html").read_text("utf-8")
    inline = "".join(f" 'sha256-{_sha256(script)}'" for script in _IMPORT_MAP.findall(html))
    policy = {
        "default-src": "'none'",
        "script-src": f"'self'{inline}",
        "style-src": "'self'",
        "img-src": "'self' data: blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "ETag": f'"{hashlib.sha256(html.encode()).hexdigest()[:32]}"',
        "Cache-Control": "no-cache",
        "Referrer-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
    }
    return _Document(html.encode(), headers)


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@router.get("/")
async def get_root() -> RedirectResponse:
    """Where a browser begins."""
    return RedirectResponse("/page")


@router.get("/page")
@router.get("/page/{view:path}")
async def get_page(view: str = "") -> Response:
    """The page's document, whose script reads the view from the address."""
    document = _document()
    return ConditionalResponse(document.html, 200, document.headers, "text/html; charset=utf-8")
