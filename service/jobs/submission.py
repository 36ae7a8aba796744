"""From a submitted text and config to a job that can be queued: its tokens, steps and size, or why it is refused.

Only arithmetic and tokenising: no row is read or written, and no model is built. Knows no HTTP and no torch.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from nanomoe import lineage
from nanomoe.cohort_shape import cohort_key
from nanomoe.config import ConfigWarning, JobConfig
from nanomoe.config_warnings import config_warnings
from nanomoe.model import size
from nanomoe.model.size import Sizes
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
from service.jobs.new_job import NewJob
from service.settings import Settings

TOKENISED_AT_ONCE_BYTES = 256 * 1024
"""Longer texts are tokenised when training starts; until then the numbers of their tokens and steps are unknown."""


@dataclass(frozen=True)
class Parent:
    """The checkpoint that a job starts from (`init_from`)."""

    job_id: str
    """Id of the job that recorded the checkpoint; the request may have named it otherwise."""

    config: JobConfig
    """Config of that job."""

    tokenizer: Tokenizer
    """The tokenizer in the checkpoint's files. The job uses it, even where its name stands for another by now."""

    text_sha256: str
    """SHA-256 of the text that the checkpoint was trained on, hexadecimal."""


@dataclass(frozen=True)
class Assessment:
    """What a job will need. None stands for what is known only once the text is tokenised."""

    text: str
    config: JobConfig
    n_bytes: int
    n_tokens: int | None
    plan: Plan | None
    sizes: Sizes
    cohort_key: str | None
    """Shape of the job, by which it may be trained together with others; None also for a job that is trained alone."""

    warnings: list[ConfigWarning]

    @property
    def text_sha256(self) -> str:
        """SHA-256 of the text's UTF-8 bytes, hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def new_job(
        self,
        *,
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
        priority: int = 0,
        run_at: datetime | None = None,
        idempotency_key: str | None = None,
    ) -> NewJob:
        """The job, ready for `submit_job`."""
        parent = self.config.init_from
        return NewJob(
            text=self.text,
            config=self.config.model_dump(mode="json"),
            name=name,
            tags=tags or {},
            priority=priority,
            run_at=run_at,
            n_tokens=self.n_tokens,
            total_steps=None if self.plan is None else self.plan.total_steps,
            n_params=self.sizes.n_params,
            n_active_params=self.sizes.n_active_params,
            training_bytes=self.sizes.least_training_bytes,
            cohort_key=self.cohort_key,
            warnings=[warning.model_dump(mode="json") for warning in self.warnings],
            parent_id=None if parent is None else parent.job_id,
            parent_percent=None if parent is None else parent.checkpoint,
            idempotency_key=idempotency_key,
        )


@dataclass(frozen=True)
class Tokenised:
    """What a tokenizer makes of a text. None stands for what is known only at the start of training."""

    tokenizer: Tokenizer | None
    n_tokens: int | None


class Assessor:
    """Assesses the jobs of one request. A text is tokenised once for each tokenizer, however many jobs it has."""

    def __init__(self, settings: Settings, parent: Parent | None) -> None:
        """`parent`: the checkpoint in `init_from` of every job."""
        self._settings = settings
        self._parent = parent
        self._tokenised: dict[tuple[str, str], Tokenised] = {}

    def assess(self, text: str, config: JobConfig) -> Assessment:
        """`assess` of one of the jobs."""
        return _assess(text, config, self._settings, self._parent, self._tokenise)

    def _tokenise(self, text: str, name: str, n_bytes: int) -> Tokenised:
        found = self._tokenised.get((text, name))
        if found is None:
            found = self._tokenised[text, name] = _tokenise(text, name, n_bytes, self._settings, self._parent)
        return found


def assess(text: str, config: JobConfig, settings: Settings, parent: Parent | None) -> Assessment:
    """Compute what a job will need, and compare it with the server's limits. `parent`: the checkpoint in `init_from`.

    Raises:
        TooLarge: `text_too_large`.
        Invalid: `invalid_text`, `text_too_short`, `job_too_large`, `parent_does_not_fit`, or a code of
            `TokenizerError`.
    """
    return Assessor(settings, parent).assess(text, config)


def _tokenise(text: str, name: str, n_bytes: int, settings: Settings, parent: Parent | None) -> Tokenised:
    tokenizer = _tokenizer(text, name, n_bytes, settings) if parent is None else parent.tokenizer
    is_known = tokenizer is not None and n_bytes <= TOKENISED_AT_ONCE_BYTES
    return Tokenised(tokenizer, len(tokenizer.encode(text)) if tokenizer is not None and is_known else None)


def _assess(
    text: str,
    config: JobConfig,
    settings: Settings,
    parent: Parent | None,
    tokenise: Callable[[str, str, int], Tokenised],
) -> Assessment:
    if parent is not None and config.init_from is not None:
        origin = config.init_from.model_copy(update={"job_id": parent.job_id})
        config = config.model_copy(update={"init_from": origin})
    n_bytes = _n_bytes(text, settings.max_text_bytes)
    of_parent = [] if parent is None else _warnings_of_parent(text, config, parent, settings)
    # Before a tokenizer is loaded or trained: a model that is too large even with the smallest vocabulary.
    _refuse_if_over(settings, parameters=size.n_params(config, MIN_VOCAB_SIZE))
    tokenised = tokenise(text, config.tokenizer, n_bytes)
    tokenizer, n_tokens = tokenised.tokenizer, tokenised.n_tokens
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
    of_memory = Sizes(training_bytes=at_most.training_bytes, least_training_bytes=at_most.least_training_bytes)
    sizes = at_most if tokenizer is not None else of_memory
    shape = None
    if vocab_size is not None and n_tokens is not None:
        shape = cohort_key(config, vocab_size=vocab_size, n_tokens=n_tokens)
    return Assessment(text, config, n_bytes, n_tokens, plan, sizes, shape, warnings)


def _most_entries(tokenizer: str) -> int:
    """Entries that `train:N` has at most."""
    most = known_vocab_size(tokenizer)
    assert most is not None, "every other tokenizer is loaded"
    return most


def _warnings_of_parent(text: str, config: JobConfig, parent: Parent, settings: Settings) -> list[ConfigWarning]:
    """Warnings where the parent decides otherwise than the config says. Raises Invalid `parent_does_not_fit`."""
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
    is_same |= todays is None and parent.text_sha256 == hashlib.sha256(text.encode()).hexdigest()
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


def _tokenizer(text: str, name: str, n_bytes: int, settings: Settings) -> Tokenizer | None:
    """The tokenizer of a job without a parent; None for one that must be trained on a text that is too long for that
    now."""
    folders = [] if settings.tokenizer_dir is None else [settings.tokenizer_dir]
    try:
        check_tokenizer_name(name)
        if name.startswith("train:") and n_bytes > TOKENISED_AT_ONCE_BYTES:
            return None
        return load_tokenizer(name, text=text, allow_hub=settings.allow_hub, allowed_folders=folders)
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
    """Raise Invalid `job_too_large` for figures over a limit of the server; None stands for an unknown one."""
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
