"""From a submitted text and config to a job that can be queued: what it will be, and why it may be refused.

Everything here is arithmetic and tokenising; no row is read or written, and nothing is built. Knows no HTTP and no
torch.
"""

import hashlib
from dataclasses import dataclass
from typing import Self

from nanomoe import lineage
from nanomoe.config import ConfigWarning, JobConfig
from nanomoe.config_warnings import config_warnings
from nanomoe.model import size
from nanomoe.plan import Plan, TextTooShort
from nanomoe.tokenizer import (
    MIN_VOCAB_SIZE,
    Tokenizer,
    TokenizerError,
    check_tokenizer_name,
    known_vocab_size,
    load_tokenizer,
)
from service.errors import Invalid, TooLarge
from service.http.schemas import SubmitRequest
from service.jobs.queue import NewJob
from service.settings import Settings

TOKENISED_AT_ONCE_BYTES = 256 * 1024
"""Longer texts are tokenised when training starts; until then their tokens and steps are not known."""


@dataclass(frozen=True)
class Parent:
    """The checkpoint in `init_from`, as far as it decides what a job will be."""

    config: JobConfig
    """Config of the job that recorded it."""

    tokenizer: Tokenizer
    """The one in the checkpoint's files, which the job goes on with whatever its name stands for today."""

    text_sha256: str
    """SHA-256 of the text that it was trained on, hexadecimal."""


@dataclass(frozen=True)
class Sizes:
    """How large a job's model is; None where the vocabulary is not known yet."""

    n_params: int | None = None
    n_active_params: int | None = None
    training_bytes: int | None = None
    flops_per_token: int | None = None

    @classmethod
    def of(cls, config: JobConfig, vocab_size: int, n_tokens: int) -> Self:
        return cls(
            size.n_params(config, vocab_size),
            size.n_active_params(config, vocab_size),
            size.training_bytes(config, vocab_size, n_tokens),
            size.flops_per_token(config, vocab_size, min(n_tokens, config.block_size)),
        )


@dataclass(frozen=True)
class Assessment:
    """What a request comes to. None stands for what is known only once the text is tokenised."""

    request: SubmitRequest
    n_bytes: int
    n_tokens: int | None
    plan: Plan | None
    sizes: Sizes
    warnings: list[ConfigWarning]

    @property
    def text_sha256(self) -> str:
        """SHA-256 of the text's UTF-8 bytes, hexadecimal."""
        return hashlib.sha256(self.request.text.encode()).hexdigest()

    def new_job(self, idempotency_key: str | None) -> NewJob:
        """The job, ready for `queue.submit`."""
        request, parent = self.request, self.request.config.init_from
        return NewJob(
            text=request.text,
            config=request.config.model_dump(mode="json"),
            name=request.name,
            tags=request.tags,
            priority=request.priority,
            run_at=request.run_at,
            n_tokens=self.n_tokens,
            total_steps=None if self.plan is None else self.plan.total_steps,
            n_params=self.sizes.n_params,
            n_active_params=self.sizes.n_active_params,
            training_bytes=self.sizes.training_bytes,
            warnings=[warning.model_dump(mode="json") for warning in self.warnings],
            parent_id=None if parent is None else parent.job_id,
            parent_percent=None if parent is None else parent.checkpoint,
            idempotency_key=idempotency_key,
        )


def assess(request: SubmitRequest, settings: Settings, parent: Parent | None) -> Assessment:
    """Measure what a request asks for against what this server allows. `parent`: the checkpoint in `init_from`.

    Raises:
        TooLarge: `text_too_large`.
        Invalid: `invalid_text`, `text_too_short`, `job_too_large`, `parent_does_not_fit`, or a code of
            `TokenizerError`.
    """
    config = request.config
    n_bytes = _n_bytes(request.text, settings.max_text_bytes)
    of_parent = [] if parent is None else _warnings_of_parent(request, parent, settings)
    # Before a tokenizer is loaded, let alone trained: what is absurd with the fewest entries is refused at once.
    _refuse_if_over(settings, parameters=size.n_params(config, MIN_VOCAB_SIZE))
    tokenizer = _tokenizer(request, n_bytes, settings) if parent is None else parent.tokenizer

    n_tokens: int | None = None
    if tokenizer is not None and n_bytes <= TOKENISED_AT_ONCE_BYTES:
        n_tokens = len(tokenizer.encode(request.text))
    plan = None if n_tokens is None else _plan(config, n_tokens)
    # Every token holds a byte or more, so the bytes bound the tokens that are not counted yet; and the N of train:N
    # bounds the entries of a tokenizer that is not trained yet.
    n_at_most = n_bytes if n_tokens is None else n_tokens
    vocab_size = None if tokenizer is None else tokenizer.vocab_size
    at_most = Sizes.of(config, vocab_size or _most_entries(config.tokenizer), n_at_most)
    _refuse_if_over(
        settings,
        parameters=at_most.n_params,
        training_bytes=at_most.training_bytes,
        steps=None if plan is None else plan.total_steps,
    )
    warnings = config_warnings(config, plan, n_bytes=n_bytes, vocab_size=vocab_size) + of_parent
    sizes = at_most if tokenizer is not None else Sizes(training_bytes=at_most.training_bytes)
    return Assessment(request, n_bytes, n_tokens, plan, sizes, warnings)


def _most_entries(tokenizer: str) -> int:
    """Entries that `train:N` has at most."""
    most = known_vocab_size(tokenizer)
    assert most is not None, "every other tokenizer is loaded"
    return most


def _warnings_of_parent(request: SubmitRequest, parent: Parent, settings: Settings) -> list[ConfigWarning]:
    """What the parent decides otherwise than the config says. Refuses weights that have no place in this model."""
    config = request.config
    todays = _todays_tokenizer(config.tokenizer, settings)
    is_same = todays is not None and todays.definition == parent.tokenizer.definition
    # A tokenizer is what its files say, under whatever name.
    named_alike = config.model_copy(update={"tokenizer": parent.config.tokenizer}) if is_same else config
    if reasons := lineage.misfits(named_alike, parent.config):
        raise Invalid(
            "parent_does_not_fit",
            f"the weights of init_from do not fit this model: {'; '.join(reasons)}",
            errors=[{"loc": ["body", "config"], "msg": reason} for reason in reasons],
        )
    found = lineage.warnings(config, parent.config)
    is_known = todays is not None or config.tokenizer.startswith("train:")
    is_same |= todays is None and parent.text_sha256 == hashlib.sha256(request.text.encode()).hexdigest()
    if is_known and not is_same:
        message = (
            f"the job goes on with the {config.tokenizer} of its parent, {parent.tokenizer.vocab_size:,} entries: the "
            "name alone would give another tokenizer today"
        )
        found.append(ConfigWarning(code="tokenizer_of_parent", message=message))
    return found


def _todays_tokenizer(name: str, settings: Settings) -> Tokenizer | None:
    """What the name stands for on this machine; None for one that would be trained, or fetched from the hub."""
    if name.startswith("train:"):
        return None
    folders = [] if settings.tokenizer_dir is None else [settings.tokenizer_dir]
    try:
        return load_tokenizer(name, allowed_folders=folders)
    except TokenizerError:
        return None


def _n_bytes(text: str, limit: int) -> int:
    try:
        n_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise Invalid("invalid_text", "the text holds half of a surrogate pair, which is no character") from error
    if n_bytes > limit:
        raise TooLarge("text_too_large", f"the text has {n_bytes:,} bytes; this server takes at most {limit:,}")
    return n_bytes


def _tokenizer(request: SubmitRequest, n_bytes: int, settings: Settings) -> Tokenizer | None:
    """The tokenizer of a job without a parent; None for one that must be trained on a text that is too long for that
    now."""
    name = request.config.tokenizer
    folders = [] if settings.tokenizer_dir is None else [settings.tokenizer_dir]
    try:
        check_tokenizer_name(name)
        if name.startswith("train:") and n_bytes > TOKENISED_AT_ONCE_BYTES:
            return None
        return load_tokenizer(name, text=request.text, allow_hub=settings.allow_hub, allowed_folders=folders)
    except TokenizerError as error:
        where = [{"loc": ["body", "config", "tokenizer"], "msg": str(error)}]
        raise Invalid(error.code, str(error), errors=where) from error


def _plan(config: JobConfig, n_tokens: int) -> Plan:
    try:
        return Plan.of(config, n_tokens)
    except TextTooShort as error:
        raise Invalid(error.code, str(error), errors=[{"loc": ["body", "text"], "msg": str(error)}]) from error


def _refuse_if_over(
    settings: Settings, *, parameters: int | None = None, training_bytes: int | None = None, steps: int | None = None
) -> None:
    """Refuse what is over a limit of the server's; None stands for what is not known yet."""
    figures = (
        (parameters, settings.max_params, "parameters"),
        (training_bytes, settings.max_training_bytes, "bytes of memory for training"),
        (steps, settings.max_steps, "optimizer steps"),
    )
    over = [
        f"{figure:,} {what}, of which this server allows {limit:,}"
        for figure, limit, what in figures
        if figure is not None and figure > limit
    ]
    if over:
        raise Invalid(
            "job_too_large",
            f"the job would need {'; and '.join(over)}",
            errors=[{"loc": ["body", "config"], "msg": reason} for reason in over],
        )
