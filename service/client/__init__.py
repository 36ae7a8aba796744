"""The Python client: the service's routes as methods, its responses as the service's own classes. Loads no torch.

with Client() as client:
    job = client.submit("Era uma vez ...", {"epochs": 500})
    job.wait(on_event=print)
    print(job.generate("Era uma", checkpoint=100).choices[0].text)
"""

from typing import TYPE_CHECKING, Any

from service.client.blocking import Client, JobHandle, SweepHandle
from service.client.comparison import Comparison
from service.client.errors import (
    ClientError,
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    Problem,
    Unavailable,
    UnexpectedAnswer,
    Unreachable,
)
from service.client.events import JobEvent

if TYPE_CHECKING:
    from service.client.asynchronous import AsyncClient, AsyncJobHandle, AsyncSweepHandle

__all__ = [
    "AsyncClient",
    "AsyncJobHandle",
    "AsyncSweepHandle",
    "Client",
    "ClientError",
    "Comparison",
    "Conflict",
    "Forbidden",
    "Invalid",
    "JobEvent",
    "JobHandle",
    "NotFound",
    "Problem",
    "SweepHandle",
    "Unavailable",
    "UnexpectedAnswer",
    "Unreachable",
]


def __getattr__(name: str) -> Any:
    """Import the asynchronous client at its first use: asyncio takes longer to load than most requests."""
    if name in ("AsyncClient", "AsyncJobHandle", "AsyncSweepHandle"):
        from service.client import asynchronous

        return getattr(asynchronous, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
