"""The fields of a job's handle: those of the `JobView` that the service last answered, under the same names.

Their documentation is that of `JobView`, so that a field is described once.
"""

from collections.abc import Callable
from typing import Generic, Self, TypeVar, overload

from service.http.schemas import JobView

T = TypeVar("T")


class ViewField(Generic[T]):
    """A read-only attribute of a handle, taken from its `view`."""

    def __init__(self, read: Callable[[JobView], T]) -> None:
        self._read = read

    def __set_name__(self, owner: type, name: str) -> None:
        field = JobView.model_fields.get(name)
        described = getattr(JobView, name).__doc__ if field is None else field.description
        self.__doc__ = (described or "").replace("null", "None")

    @overload
    def __get__(self, handle: None, owner: type) -> Self: ...

    @overload
    def __get__(self, handle: "JobFields", owner: type) -> T: ...

    def __get__(self, handle: "JobFields | None", owner: type) -> Self | T:
        return self if handle is None else self._read(handle.view)

    def __set__(self, handle: "JobFields", value: object) -> None:
        raise AttributeError("a job's fields are read-only; `update` changes its name and tags")


class JobFields:
    """The fields of `JobView`, each as an attribute, but for `text`: that is a method of a handle."""

    view: JobView
    """The job as the service last answered it; `refresh` asks again."""

    id = ViewField(lambda view: view.id)
    name = ViewField(lambda view: view.name)
    tags = ViewField(lambda view: view.tags)
    status = ViewField(lambda view: view.status)
    status_reason = ViewField(lambda view: view.status_reason)
    is_terminal = ViewField(lambda view: view.is_terminal)
    queue_position = ViewField(lambda view: view.queue_position)
    estimated_start_at = ViewField(lambda view: view.estimated_start_at)
    created_at = ViewField(lambda view: view.created_at)
    started_at = ViewField(lambda view: view.started_at)
    finished_at = ViewField(lambda view: view.finished_at)
    attempt = ViewField(lambda view: view.attempt)
    priority = ViewField(lambda view: view.priority)
    run_at = ViewField(lambda view: view.run_at)
    execution = ViewField(lambda view: view.execution)
    progress = ViewField(lambda view: view.progress)
    config = ViewField(lambda view: view.config)
    model = ViewField(lambda view: view.model)
    warnings = ViewField(lambda view: view.warnings)
    error = ViewField(lambda view: view.error)
    parent = ViewField(lambda view: view.parent)
    sweep_id = ViewField(lambda view: view.sweep_id)
