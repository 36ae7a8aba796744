"""Ready experiments."""

from pydantic import ConfigDict

from service.http.schemas.base import View
from service.http.schemas.sweeps import SweepRequest


class LookAt(View):
    """The question of an experiment, and what to look at in its result."""

    en: str
    """The text in English."""

    pt: str
    """The text in Brazilian Portuguese."""


class PresetCompare(View):
    """The query of `GET /compare` that answers an experiment's question, beside `sweep`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"metric": ["loss"], "perplexity": None}]})

    metric: list[str]
    """Metrics to compare."""

    perplexity: float | None
    """Perplexity for which to say when each job came to it; null for none."""


class PresetView(View):
    """An experiment that is ready to be submitted."""

    name: str
    """Name of the experiment."""

    look_at: LookAt
    """Question of the experiment, and what to look at in its result."""

    sweep: SweepRequest
    """The body of `POST /sweeps` that submits it."""

    compare: PresetCompare
    """The query of `GET /compare` that answers its question."""
