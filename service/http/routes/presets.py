"""Ready experiments: each one's request, what to compare, and what to look at."""

from fastapi import APIRouter

from service.http import schemas, views
from service.http.openapi import problems
from service.presets import PRESETS

router = APIRouter(tags=["sweeps"])


@router.get(
    "/presets",
    summary="List ready experiments",
    response_description="All ready experiments.",
    responses=problems(),
)
def list_presets() -> schemas.Listing[schemas.PresetView]:
    """The ready experiments, each the body of a `POST /sweeps`, with one sentence on what to look at."""
    return schemas.Listing(data=[views.preset(one) for one in PRESETS])
