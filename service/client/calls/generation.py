"""Calls that evaluate a checkpoint: generating text, scoring it, and examining a prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

from nanomoe.config import PERCENTS
from service.client.calls.call import Call, as_bytes, parsed
from service.client.calls.jobs import CheckpointSelector
from service.http import schemas

Target = str | tuple[str, CheckpointSelector]
"""A checkpoint among several: `"JOB"` is its newest, `"JOB@50"` and `("JOB", 50)` that at 50 %; as `get_job` takes a
job."""

GENERATE_SECONDS = 600
"""Read time-out of generation: for a long text on a slow machine no byte is sent earlier."""

_SELECTORS: dict[str, CheckpointSelector] = {**{str(percent): percent for percent in PERCENTS}, "latest": "latest"}


def generate(
    job_id: str, /, prompt: str, checkpoint: CheckpointSelector = "latest", **sampling: Any
) -> Call[schemas.GenerateResponse]:
    """Continue `prompt` from a checkpoint; `sampling` are the other fields of `GenerateRequest`."""
    body = {"job_id": job_id, "checkpoint": checkpoint, "prompt": prompt, **sampling}
    read = parsed(schemas.GenerateResponse)
    return Call("POST", "/generate", read, body=body, repeatable=False, read_seconds=GENERATE_SECONDS)


def generate_stream(
    job_id: str, /, prompt: str, checkpoint: CheckpointSelector = "latest", **sampling: Any
) -> Call[bytes]:
    """`generate`, answered as a stream of events."""
    body = {"job_id": job_id, "checkpoint": checkpoint, "prompt": prompt, "stream": True, **sampling}
    return Call("POST", "/generate", as_bytes, body=body, repeatable=False, read_seconds=GENERATE_SECONDS)


def generate_targets(targets: Sequence[Target], prompt: str, **sampling: Any) -> Call[schemas.GenerateTargetsResponse]:
    """Continue `prompt` from several checkpoints with the same seed, side by side; each is `"JOB@50"`, `"JOB"` for its
    newest, or a pair of job and percent. `sampling` are the other fields of `GenerateRequest`."""
    body = _generation_of(targets, prompt, sampling)
    read = parsed(schemas.GenerateTargetsResponse)
    return Call("POST", "/generate", read, body=body, repeatable=False, read_seconds=GENERATE_SECONDS)


def generate_targets_stream(targets: Sequence[Target], prompt: str, **sampling: Any) -> Call[bytes]:
    """`generate_targets`, answered as a stream of events, each with the number of its target."""
    body = {**_generation_of(targets, prompt, sampling), "stream": True}
    return Call("POST", "/generate", as_bytes, body=body, repeatable=False, read_seconds=GENERATE_SECONDS)


def score(job_id: str, /, text: str, checkpoint: CheckpointSelector = "latest") -> Call[schemas.ScoreResponse]:
    """The loss of each token of `text` under a checkpoint, and the longest span copied from the training text."""
    body = {"job_id": job_id, "checkpoint": checkpoint, "text": text}
    return Call("POST", "/score", parsed(schemas.ScoreResponse), body=body, read_seconds=GENERATE_SECONDS)


def inspect(
    job_id: str, /, prompt: str, checkpoint: CheckpointSelector = "latest", *, attention: bool = True
) -> Call[schemas.InspectResponse]:
    """Evaluate `prompt`: the likeliest next tokens, the attention, and the routing of each token.

    With `attention` false, the response has no attention weights.
    """
    body = {"job_id": job_id, "checkpoint": checkpoint, "prompt": prompt, "attention": attention}
    return Call("POST", "/inspect", parsed(schemas.InspectResponse), body=body, read_seconds=GENERATE_SECONDS)


def _generation_of(targets: Sequence[Target], prompt: str, sampling: Mapping[str, Any]) -> dict[str, Any]:
    return {"targets": [_target(one) for one in targets], "prompt": prompt, **sampling}


def _target(given: Target) -> dict[str, Any]:
    if isinstance(given, str):
        job, _, which = given.rpartition("@")
        if job and which in _SELECTORS:
            return {"job_id": job, "checkpoint": _SELECTORS[which]}
        return {"job_id": given}
    return {"job_id": given[0], "checkpoint": given[1]}
