"""Calls about the service itself, and the events of all its jobs."""

from service.client.calls.call import Call, listed, parsed, stream_of_events
from service.http import schemas


def all_events(sweep: str | None, tag: str | None, last_event_id: str | None) -> Call[bytes]:
    """The events of all jobs, of those of a sweep, or with a tag, after `last_event_id`; a stream."""
    return stream_of_events("/events", last_event_id, {"sweep": sweep, "tag": tag})


def workers() -> Call[list[schemas.WorkerView]]:
    """The workers, as of their last heartbeats."""
    return Call("GET", "/workers", listed(schemas.WorkerView))


def health() -> Call[schemas.Health]:
    """Whether the service is alive."""
    return Call("GET", "/healthz", parsed(schemas.Health))


def readiness() -> Call[schemas.Readiness]:
    """Whether the service can take jobs; raises `Unavailable` while it cannot."""
    return Call("GET", "/readyz", parsed(schemas.Readiness))


def session() -> Call[schemas.SessionView]:
    """Whether a key is needed, whose the client's key is, and what is left of its owner's quotas."""
    return Call("GET", "/session", parsed(schemas.SessionView))
