"""Every setting of the API and the worker, read from `NANOMOE_...` variables and from `.env`.

Declared once: docs/settings.md is generated from these fields and the texts under them. Knows no HTTP, no torch and no
database connection.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, unquote

from pydantic import AfterValidator, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from nanomoe.logs import LogFormat
from service.access.quotas import Quotas
from service.errors import StartRefused

MIB = 1024**2
GIB = 1024**3

CommaSeparated = Annotated[tuple[str, ...], NoDecode]

_STORE = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9._-]+)*/?")

SQLITE = "sqlite:///"
"""Prefix of a SQLite database's URL; a percent-encoded path follows."""


def sqlite_url(file: Path) -> str:
    """URL of the SQLite database in `file`, whatever characters its path holds."""
    return SQLITE + quote(str(file))


def _absolute(given: Path) -> Path:
    """The path made absolute, `~` and `~user` expanded. Raises ValueError."""
    try:
        return given.expanduser().absolute()
    except RuntimeError:
        user = given.parts[0]
        raise ValueError(f"there is no user of {user}; a folder of that name is written ./{user}") from None


def _database_in(data_dir: Path) -> Path:
    """The database of a data folder. Earlier versions read the folder's path as a part of a URL, and put the database
    of one whose name holds `%` or `?` elsewhere: where such a folder was used, its database is still found."""
    file = data_dir / "nanomoe.db"
    earlier = Path(unquote(str(file).partition("?")[0]))
    try:
        was_used = (data_dir / "installation").is_file() and not file.exists()
        return earlier if was_used and earlier.is_file() else file
    except OSError:  # no such folder can exist; opening it will raise the error
        return file


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


class Settings(BaseSettings):
    """Settings of one process. `Settings()` reads the environment; keyword arguments take precedence.

    Raises pydantic's ValidationError, which names each variable that is wrong.
    """

    model_config = SettingsConfigDict(
        env_prefix="NANOMOE_",
        env_file=".env",
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    data_dir: AbsolutePath = Path("data")
    """Folder of the job files and of the SQLite database; API and workers must see the same one, unless the database is
    PostgreSQL and the job files lie in `NANOMOE_STORE`."""

    database_url: str = Field(default_factory=lambda given: sqlite_url(_database_in(given["data_dir"])))
    """URL of the database: `sqlite:///PATH` or `postgresql+psycopg://USER:PASSWORD@HOST/NAME`; the default is a file in
    the data folder. In its parts write `%`, `?` and `#` as `%25`, `%3F` and `%23`."""

    store: str | None = None
    """Bucket for the files of jobs, `s3://BUCKET/PREFIX`, in any store that speaks S3; endpoint, region and credentials
    come from the `AWS_...` variables. Unset, they lie in the data folder."""

    store_cache_bytes: int = Field(8 * GIB, ge=0)
    """Bytes of a bucket's files that are kept in the data folder once they were read; the least recently used are
    removed first. 0 keeps none."""

    downloads: Literal["stream", "redirect"] = "stream"
    """How files of checkpoints leave a bucket: through the API, or by a redirect to an address of the bucket that is
    signed for some minutes, which clients must be able to reach."""

    host: str = "127.0.0.1"
    """Address that the API listens on. Any address but loopback needs a key (`nanomoe keys create`), or
    `NANOMOE_ALLOW_NO_KEYS`."""

    port: int = Field(8000, ge=0, le=65_535)
    """TCP port of the API; 0 takes a free one and prints it."""

    allowed_hosts: CommaSeparated = ()
    """`Host` names that are accepted beside loopback's own, separated by commas."""

    allow_no_keys: bool = False
    """Whether other addresses than loopback are served before a key was made: for a container whose port is published
    on loopback only. Once one was, keys are asked for all the same."""

    default_quotas: CommaSeparated = ()
    """Quotas of an owner whose first key sets none, `NAME=VALUE` each, separated by commas (docs/access.md)."""

    page: bool = True
    """Whether the API serves the page, to which `/` leads; `false` leaves the routes and `/docs`."""

    device: str = Field("auto", min_length=1)
    """Devices that the worker trains on: `auto` (the GPU if there is one), or any of `cpu`, `cpu:N`, `cuda`, `cuda:N`
    with commas between."""

    lock_dir: AbsolutePath | None = None
    """Folder of the locks of GPUs, which all workers of a host must share; unset: one of the host's, for all its users.
    Containers that share a GPU need one on a common volume."""

    cohort: int | Literal["auto"] = "auto"
    """Most jobs of one shape that a trainer trains together: a number, or `auto`, which is measured once for a CPU or a
    GPU; 1 trains each job alone."""

    lease_seconds: float = Field(60, gt=0, le=86_400)
    """Seconds without a heartbeat after which another worker may claim a job."""

    heartbeat_seconds: float = Field(default_factory=lambda given: given["lease_seconds"] / 6, gt=0, le=3_600)
    """Seconds between a worker's heartbeats; a sixth of the lease unless set, a third at most."""

    rescue_seconds: float = Field(default_factory=lambda given: given["lease_seconds"] / 4, gt=0, le=3_600)
    """Seconds between two searches for jobs whose lease has expired; a quarter of the lease unless set."""

    snapshot_seconds: float = Field(60, gt=0, le=86_400)
    """Seconds between the rolling snapshots that an interrupted job resumes from."""

    allow_hub: bool = False
    """Whether a job may name a tokenizer of the Hugging Face hub, which is then downloaded."""

    tokenizer_dir: AbsolutePath | None = None
    """Folder under which a job may name local tokenizer folders; unset allows none."""

    max_text_bytes: int = Field(16 * MIB, ge=1, le=GIB)
    """Largest training text, in bytes of UTF-8."""

    max_model_bytes: int = Field(2 * GIB, ge=1)
    """Largest model that may be sent to be imported, in bytes of all its files."""

    max_params: int = Field(2_000_000_000, ge=1)
    """Most parameters of a model."""

    max_training_bytes: int = Field(64 * GIB, ge=1)
    """Most memory that training may need, in bytes, by the arithmetic of weights, optimizer and activations."""

    max_steps: int = Field(10_000_000, ge=1)
    """Most optimizer steps of a job."""

    max_queued: int = Field(10_000, ge=1)
    """Most jobs that may wait at once; further submissions are refused with 429."""

    engine_device: str = Field("cpu", min_length=1)
    """Device of the generation process: the default leaves the GPU to training."""

    engine_cache_bytes: int = Field(2 * GIB, ge=1)
    """Bytes of loaded checkpoints that the generation process keeps; the least recently used are evicted first."""

    engine_max_running: int = Field(64, ge=1, le=4096)
    """Sequences that are generated at the same time."""

    engine_max_waiting: int = Field(256, ge=0, le=65_536)
    """Generation requests that may wait until others have ended; further ones are refused with 429."""

    engine_preload: bool = True
    """Whether the generation process starts as soon as a worker runs or a job waits, so that the first text comes at
    once; `false` starts it with the first request, and saves its memory (some 300 MB) until then."""

    engine_start_seconds: float = Field(300, gt=0, le=3_600)
    """Longest that the generation process may take to be ready before it is killed and its requests get a 503."""

    engine_wait_seconds: float = Field(30, gt=0, le=3_600)
    """Longest that a generation request waits for its first step before it is refused with 503. Counted from when the
    generation process is ready; loading the checkpoint is part of it."""

    engine_request_seconds: float = Field(600, gt=0, le=86_400)
    """Longest that a generation request may take in all before it is ended with 503."""

    engine_threads: int | None = Field(None, ge=1, le=1024)
    """Threads of the generation process; unset: one for each core."""

    engine_nice: int = Field(10, ge=0, le=19)
    """Niceness of the generation process (nice(2)): 0 as training, 19 the lowest priority."""

    engine_max_new_tokens: int = Field(4096, ge=1, le=1_000_000)
    """Most tokens of one generated text."""

    log_format: LogFormat = "console"
    """Format of the log lines on standard error: `console` for people, `json` one object a line."""

    @field_validator("*", mode="before")
    @classmethod
    def _utf_8(cls, given: Any) -> Any:
        # Paths travel in JSON, between processes and in the database's address; a host is encoded by the resolver.
        try:
            str(given).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"must be UTF-8, and holds {str(given)[error.start : error.end]!a}") from None
        return given

    @field_validator("allowed_hosts", "default_quotas", mode="before")
    @classmethod
    def _split(cls, given: Any) -> Any:
        return tuple(part.strip() for part in given.split(",") if part.strip()) if isinstance(given, str) else given

    @field_validator("default_quotas")
    @classmethod
    def _known_quotas(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        Quotas.parse(given)
        return given

    @field_validator("cohort", mode="before")
    @classmethod
    def _auto_or_a_number(cls, given: Any) -> Any:
        if given != "auto" and not (str(given).isdecimal() and 1 <= int(given) <= 1024):
            raise ValueError("must be auto, or a number from 1 to 1024")
        return given

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, given: str) -> str:
        if not given.startswith((SQLITE, "postgresql+psycopg://")):
            raise ValueError(f"must start with {SQLITE} or postgresql+psycopg://")
        path, question, query = given.removeprefix(SQLITE).partition("?")
        if given.startswith(f"{SQLITE}~"):
            return sqlite_url(_absolute(Path(unquote(path)))) + question + query
        return given

    @field_validator("store")
    @classmethod
    def _known_store(cls, given: str | None) -> str | None:
        if given is not None and _STORE.fullmatch(given) is None:
            raise ValueError("must be s3://BUCKET or s3://BUCKET/PREFIX, of letters, digits, `.`, `_`, `-` and `/`")
        return None if given is None else given.rstrip("/")

    @field_validator("downloads")
    @classmethod
    def _redirected_from_a_bucket(cls, given: str, info: Any) -> str:
        if given == "redirect" and info.data.get("store") is None:
            raise ValueError("redirect needs NANOMOE_STORE: a folder has no address that clients could be sent to")
        return given

    @field_validator("heartbeat_seconds")
    @classmethod
    def _beats_within_the_lease(cls, given: float, info: Any) -> float:
        lease = info.data.get("lease_seconds")
        if lease is not None and given > lease / 3:
            raise ValueError(f"must be at most a third of NANOMOE_LEASE_SECONDS ({lease:g})")
        return given


def read_settings(**given: Any) -> Settings:
    """The settings of this process; `given` takes precedence over the environment. Raises StartRefused, a line for each
    fault."""
    try:
        return Settings(**given)
    except ValidationError as error:
        raise StartRefused("\n".join(_messages(error))) from None
    except UnicodeDecodeError as error:
        raise StartRefused(f".env is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from None


def _messages(error: ValidationError) -> Iterator[str]:
    for fault in error.errors(include_input=False, include_url=False):
        if fault["type"] != "default_factory_not_called":  # follows from a fault of another variable
            name = "_".join(map(str, fault["loc"])).upper()
            yield f"NANOMOE_{name}: {fault['msg'].removeprefix('Value error, ')}"
