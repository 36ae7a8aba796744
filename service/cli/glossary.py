"""Glossary of the metrics: every field with its description.

`nanomoe metrics --explain` prints it; the tables of docs/metrics.md and docs/mixture_of_experts.md are generated from
it.
"""

from collections.abc import Iterable

from pydantic import BaseModel

from nanomoe.config import JobConfig
from service.http import schemas

_IDENTITY_FIELDS = ("percent", "step", "epoch", "created_at", "layer")
"""Fields that identify the checkpoint or layer."""


NOTATION = "n_e: assignments of expert e; T tokens, E experts, K experts per token"
"""Symbols in the descriptions of a mixture's figures."""


def of_checkpoint() -> dict[str, str]:
    """The figures of a checkpoint: {field: meaning}."""
    return _meanings(schemas.CheckpointMetrics, _figures(schemas.CheckpointMetrics))


def of_mixture() -> dict[str, str]:
    """The figures of a mixture of experts, in `moe`: {field: meaning}."""
    return _meanings(schemas.MixtureLayer, _figures(schemas.MixtureLayer))


def sections() -> dict[str, dict[str, str]]:
    """The whole glossary: {heading: {field: meaning}}."""
    return {
        "a checkpoint": of_checkpoint(),
        "its baselines": _meanings(schemas.Baselines, schemas.Baselines.model_fields),
        f"its mixture of experts ({NOTATION})": of_mixture(),
        "where its job started": _meanings(JobConfig, ("init_from", "upcycle_noise")),
    }


def _figures(model: type[BaseModel]) -> list[str]:
    return [name for name in model.model_fields if name not in _IDENTITY_FIELDS]


def _meanings(model: type[BaseModel], names: Iterable[str]) -> dict[str, str]:
    return {name: " ".join((model.model_fields[name].description or "").split()) for name in names}
