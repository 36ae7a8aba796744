"""The documentation in the browser, with nothing fetched from elsewhere."""

import json

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, Response

from service.http.compressed import CompressedContent

_VENDOR = "/static/vendor/swagger-ui"

router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def get_docs() -> HTMLResponse:
    """Swagger UI over `/openapi.json`."""
    return get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="nanomoe",
        swagger_js_url=f"{_VENDOR}/swagger-ui-bundle.js",
        swagger_css_url=f"{_VENDOR}/swagger-ui.css",
        swagger_favicon_url=f"{_VENDOR}/favicon-32x32.png",
        swagger_ui_parameters={"validatorUrl": None},
    )


@router.get("/openapi.json")
def get_openapi_document(request: Request) -> Response:
    """The OpenAPI document, which the page reads its knobs from."""
    kept = request.app.state
    if not hasattr(kept, "openapi_document"):
        content = json.dumps(request.app.openapi(), ensure_ascii=False, separators=(",", ":")).encode()
        kept.openapi_document = CompressedContent(content, "application/json")
    document: CompressedContent = kept.openapi_document
    return document.respond(request.scope)
