"""The fields of a job's and a sweep's handle: those of the view that the service last answered, under the same names.

Their documentation is that of the view, so that a field is described once.
"""

from collections.abc import Callable
from typing import Generic, Protocol, Self, TypeVar, overload

from service.http.schemas import JobView, SweepView, View

T = TypeVar("T")
V = TypeVar("V", bound=View)


class Handle(Protocol[V]):
    """What has a view."""

    view: V


class ViewField(Generic[V, T]):
    """A read-only attribute of a handle, taken from its `view`."""

    def __init__(self, read: Callable[[V], T], of: type[V]) -> None:
        self._read = read
        self._of = of

    def __set_name__(self, owner: type, name: str) -> None:
        field = self._of.model_fields.get(name)
        described = getattr(self._of, name).__doc__ if field is None else field.description
        self.__doc__ = (described or "").replace("null", "None")

    @overload
    def __get__(self, handle: None, owner: type) -> Self: ...

    @overload
    def __get__(self, handle: "Handle[V]", owner: type) -> T: ...

    def __get__(self, handle: "Handle[V] | None", owner: type) -> Self | T:
        return self if handle is None else self._read(handle.view)

    def __set__(self, handle: object, value: object) -> None:
        raise AttributeError("these fields are read-only; `update` changes a job's name and tags")


class JobFields:
    """The fields of `JobView`, each as an attribute, but for `text`: that is a method of a handle."""

    view: JobView
    """The job as the service last answered it; `refresh` asks again."""

    id = ViewField(lambda view: view.id, JobView)
    name = ViewField(lambda view: view.name, JobView)
    tags = ViewField(lambda view: view.tags, JobView)
    status = ViewField(lambda view: view.status, JobView)
    status_reason = ViewField(lambda view: view.status_reason, JobView)
    is_terminal = ViewField(lambda view: view.is_terminal, JobView)
    queue_position = ViewField(lambda view: view.queue_position, JobView)
    estimated_start_at = ViewField(lambda view: view.estimated_start_at, JobView)
    created_at = ViewField(lambda view: view.created_at, JobView)
    started_at = ViewField(lambda view: view.started_at, JobView)
    finished_at = ViewField(lambda view: view.finished_at, JobView)
    attempt = ViewField(lambda view: view.attempt, JobView)
    priority = ViewField(lambda view: view.priority, JobView)
    run_at = ViewField(lambda view: view.run_at, JobView)
    execution = ViewField(lambda view: view.execution, JobView)
    cohort = ViewField(lambda view: view.cohort, JobView)
    progress = ViewField(lambda view: view.progress, JobView)
    config = ViewField(lambda view: view.config, JobView)
    model = ViewField(lambda view: view.model, JobView)
    warnings = ViewField(lambda view: view.warnings, JobView)
    error = ViewField(lambda view: view.error, JobView)
    parent = ViewField(lambda view: view.parent, JobView)
    sweep_id = ViewField(lambda view: view.sweep_id, JobView)
    figures = ViewField(lambda view: view.figures, JobView)


class SweepFields:
    """The fields of `SweepView`, each as an attribute."""

    view: SweepView
    """The sweep as the service last answered it; `refresh` asks again."""

    id = ViewField(lambda view: view.id, SweepView)
    name = ViewField(lambda view: view.name, SweepView)
    tags = ViewField(lambda view: view.tags, SweepView)
    status = ViewField(lambda view: view.status, SweepView)
    counts = ViewField(lambda view: view.counts, SweepView)
    created_at = ViewField(lambda view: view.created_at, SweepView)
    config = ViewField(lambda view: view.config, SweepView)
    parameters = ViewField(lambda view: view.parameters, SweepView)
    job_ids = ViewField(lambda view: view.job_ids, SweepView)
    progress = ViewField(lambda view: view.progress, SweepView)
    eta_seconds = ViewField(lambda view: view.eta_seconds, SweepView)
    is_terminal = ViewField(lambda view: view.is_terminal, SweepView)
