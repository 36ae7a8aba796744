"""What goes in and out over HTTP: the requests and answers of every route, as classes shared with the Python client.

Requests are strict and refuse unknown keys. Answers are lenient, so that an older client reads a newer server. Knows no
torch, no FastAPI and no database.
"""

from service.schemas.base import JOB_ID_PATTERN, TERMINAL, Listing, Page, Percent, Problem, ProblemError, Status, View
from service.schemas.checkpoints import (
    Baselines,
    CheckpointFigures,
    CheckpointMetrics,
    CheckpointView,
    Continuation,
    FileView,
    Metrics,
    ReconstructedToken,
    Reconstruction,
    ReconstructionPage,
    StepSeries,
)
from service.schemas.generation import (
    Choice,
    GenerateChunk,
    GenerateEnd,
    GenerateRequest,
    GenerateResponse,
    Timing,
    TokenLogProb,
    Usage,
)
from service.schemas.jobs import (
    Estimate,
    JobError,
    JobPatch,
    JobView,
    ModelSize,
    Parent,
    Progress,
    StatusEvent,
    SubmitRequest,
    TextInfo,
)
from service.schemas.system import Device, Health, Readiness, WorkerView

__all__ = [
    "JOB_ID_PATTERN",
    "TERMINAL",
    "Baselines",
    "CheckpointFigures",
    "CheckpointMetrics",
    "CheckpointView",
    "Choice",
    "Continuation",
    "Device",
    "Estimate",
    "FileView",
    "GenerateChunk",
    "GenerateEnd",
    "GenerateRequest",
    "GenerateResponse",
    "Health",
    "JobError",
    "JobPatch",
    "JobView",
    "Listing",
    "Metrics",
    "ModelSize",
    "Page",
    "Parent",
    "Percent",
    "Problem",
    "ProblemError",
    "Progress",
    "Readiness",
    "ReconstructedToken",
    "Reconstruction",
    "ReconstructionPage",
    "Status",
    "StatusEvent",
    "StepSeries",
    "SubmitRequest",
    "TextInfo",
    "Timing",
    "TokenLogProb",
    "Usage",
    "View",
    "WorkerView",
]
