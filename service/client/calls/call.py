"""One request of the HTTP contract: how it is built, and how its response is parsed. Does no I/O."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any, BinaryIO, Generic, Literal, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from service.client.errors import UnexpectedAnswer, problem_of
from service.http import schemas

T = TypeVar("T")
Answer = TypeVar("Answer", bound=BaseModel)


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request, and the parser of its response."""

    method: Literal["GET", "POST", "PATCH", "DELETE"]
    path: str
    read: Callable[[httpx.Response], T]
    """Parses the body of a successful response."""

    params: Mapping[str, str | float | bool | list[str] | None] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    """Parts of a form that are no files."""

    files: Sequence[Path] = ()
    """Files of a form, sent in parts named `files`."""

    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = True
    """Whether the request is idempotent, so that it may be repeated when its response was lost."""

    redirects: bool = False
    """Whether the answer may be elsewhere: a redirect is followed, without the key where it leads to another origin."""

    read_seconds: float | None = None
    """Read time-out in seconds; None is the client's own setting."""

    @contextmanager
    def opened(self) -> Iterator[list[BinaryIO]]:
        """The files, open until the request has been sent."""
        with ExitStack() as stack:
            yield [stack.enter_context(path.open("rb")) for path in self.files]

    def request(self, http: httpx.Client | httpx.AsyncClient, files: Sequence[BinaryIO] = ()) -> httpx.Request:
        """The request, with the base address, key and time-outs of `http`. `files`: what `opened` gave."""
        timeout = http.timeout.as_dict()
        if self.read_seconds is not None:
            timeout["read"] = self.read_seconds
        form: dict[str, Any] = {}
        if files:
            names = [path.name for path in self.files]
            parts = [("files", (name, file)) for name, file in zip(names, files, strict=True)]
            form = {"data": dict(self.fields), "files": parts}
        return http.build_request(
            self.method,
            self.path,
            params={name: value for name, value in self.params.items() if value is not None},
            json=self.body,
            **form,
            headers=dict(self.headers),
            timeout=httpx.Timeout(**timeout),
        )

    def answer(self, response: httpx.Response) -> T:
        """Parse a response whose body has been read; raises `Problem` or `UnexpectedAnswer`."""
        check(response)
        return self.read(response)


def check(response: httpx.Response) -> None:
    """Raise the exception of an unsuccessful response; the body of an error must have been read."""
    if response.is_error:
        raise problem_of(response)
    if not response.is_success:
        raise UnexpectedAnswer(
            f"{response.request.url} answered {response.status_code}, which is not in the HTTP contract"
        )


def method_signature(build: Callable[..., Any]) -> Signature:
    """The signature of a client's method that makes this call, as `help` and notebooks show it."""
    own = signature(build)
    return own.replace(parameters=[Parameter("self", Parameter.POSITIONAL_ONLY), *own.parameters.values()])


def path_of(*parts: str) -> str:
    """The path of these parts, each percent-encoded: a job may be given by its name, which may hold a slash."""
    return "".join(f"/{quote(part, safe='')}" for part in parts)


def parsed(kind: type[Answer]) -> Callable[[httpx.Response], Answer]:
    """Parser of a body in JSON; it raises `UnexpectedAnswer` where the body is no `kind`."""

    def read(response: httpx.Response) -> Answer:
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            raise UnexpectedAnswer(
                f"{response.request.url} did not answer with a {kind.__name__}: another program, or another version"
            ) from error

    return read


def listed(kind: type[Answer]) -> Callable[[httpx.Response], list[Answer]]:
    """Parser of a response that lists all there are of `kind`, without pages."""
    read = parsed(schemas.Listing[kind])  # type: ignore[valid-type]
    return lambda response: read(response).data


def as_bytes(response: httpx.Response) -> bytes:
    """Parser of a body that is read as it is."""
    return response.content


def as_text(response: httpx.Response) -> str:
    """Parser of a body in UTF-8."""
    return response.content.decode()


def stream_of_events(
    path: str, last_event_id: str | None, params: Mapping[str, str | None] | None = None
) -> Call[bytes]:
    """The events at `path` after `last_event_id`, a stream. The service sends a ping every 15 seconds."""
    headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
    if last_event_id is not None:
        headers["Last-Event-ID"] = last_event_id
    return Call("GET", path, as_bytes, params=params or {}, headers=headers, read_seconds=45)
