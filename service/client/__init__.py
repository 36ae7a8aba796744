"""The Python client: the service's routes as methods, its answers as the service's own classes. Loads no torch.

with Client() as client:
    job = client.submit("Era uma vez ...", {"epochs": 500})
    job.wait(on_event=print)
    print(job.generate("Era uma", checkpoint=100).choices[0].text)
"""

from typing import TYPE_CHECKING, Any

from service.client.blocking import Client, JobHandle
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
    from service.client.asynchronous import AsyncClient, AsyncJobHandle

__all__ = [
    "AsyncClient",
    "AsyncJobHandle",
    "Client",
    "ClientError",
    "Conflict",
    "Forbidden",
    "Invalid",
    "JobEvent",
    "JobHandle",
    "NotFound",
    "Problem",
    "Unavailable",
    "UnexpectedAnswer",
    "Unreachable",
]


def __getattr__(name: str) -> Any:
    """The asynchronous client, imported when it is asked for: asyncio takes longer to load than most requests."""
    if name in ("AsyncClient", "AsyncJobHandle"):
        from service.client import asynchronous

        return getattr(asynchronous, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
