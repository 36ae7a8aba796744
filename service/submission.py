"""From a submitted text and config to a job that can be queued: what it will be, and why it may be refused.

Everything here is arithmetic and tokenising; no row is read or written, and nothing is built. Knows no HTTP and no
torch.
"""

import hashlib
from dataclasses import dataclass
from typing import Self

from nanomoe import lineage, size
from nanomoe.config import ConfigWarning, JobConfig
from nanomoe.plan import Plan, TextTooShort
from nanomoe.tokenizer import Tokenizer, TokenizerError, known_vocab_size, load_tokenizer
from service.errors import Invalid, TooLarge
from service.queue import NewJob
from service.schemas import SubmitRequest
from service.settings import Settings

TOKENISED_AT_ONCE_BYTES = 256 * 1024
"""Longer texts are tokenised when training starts; until then their tokens and steps are not known."""


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
        """Of the text's UTF-8 bytes."""
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


def assess(request: SubmitRequest, settings: Settings, parent: JobConfig | None) -> Assessment:
    """Measure what a request asks for against what this server allows. `parent`: the config of the job in `init_from`.

    Raises:
        TooLarge: `text_too_large`.
        Invalid: `invalid_text`, `text_too_short`, `job_too_large`, `parent_does_not_fit`, or a code of
            `TokenizerError`.
    """
    config = request.config
    of_parent = [] if parent is None else _warning_of_parent(config, parent)
    n_bytes = _n_bytes(request.text, settings.max_text_bytes)
    try:
        vocab_size = known_vocab_size(config.tokenizer)
        if vocab_size is not None:
            # Before the tokenizer is loaded, let alone trained: what is absurd is refused at once.
            _refuse_if_over(settings, parameters=size.n_params(config, vocab_size))
        tokenizer = _tokenizer(request, n_bytes, settings)
    except TokenizerError as error:
        where = [{"loc": ["body", "config", "tokenizer"], "msg": str(error)}]
        raise Invalid(error.code, str(error), errors=where) from error

    n_tokens: int | None = None
    if tokenizer is not None:
        vocab_size = tokenizer.vocab_size
        if n_bytes <= TOKENISED_AT_ONCE_BYTES:
            n_tokens = len(tokenizer.encode(request.text))
    plan = None if n_tokens is None else _plan(config, n_tokens)
    # Every token holds a byte or more, so the bytes bound the tokens that are not counted yet.
    n_at_most = n_bytes if n_tokens is None else n_tokens
    sizes = Sizes() if vocab_size is None else Sizes.of(config, vocab_size, n_at_most)
    _refuse_if_over(
        settings,
        parameters=sizes.n_params,
        training_bytes=sizes.training_bytes,
        steps=None if plan is None else plan.total_steps,
    )
    return Assessment(request, n_bytes, n_tokens, plan, sizes, config.warnings(n_tokens) + of_parent)


def _warning_of_parent(config: JobConfig, parent: JobConfig) -> list[ConfigWarning]:
    """What growing the parent changes. Refuses to start from weights that have no place in this model."""
    if reasons := lineage.misfits(config, parent):
        raise Invalid(
            "parent_does_not_fit",
            f"the weights of init_from do not fit this model: {'; '.join(reasons)}",
            errors=[{"loc": ["body", "config"], "msg": reason} for reason in reasons],
        )
    warning = lineage.upcycle_warning(config, parent)
    return [] if warning is None else [warning]


def _n_bytes(text: str, limit: int) -> int:
    try:
        n_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise Invalid("invalid_text", "the text holds half of a surrogate pair, which is no character") from error
    if n_bytes > limit:
        raise TooLarge("text_too_large", f"the text has {n_bytes:,} bytes; this server takes at most {limit:,}")
    return n_bytes


def _tokenizer(request: SubmitRequest, n_bytes: int, settings: Settings) -> Tokenizer | None:
    """The job's tokenizer; None for one that must be trained on a text that is too long for that now."""
    name = request.config.tokenizer
    if name.startswith("train:") and n_bytes > TOKENISED_AT_ONCE_BYTES:
        return None
    folders = [] if settings.tokenizer_dir is None else [settings.tokenizer_dir]
    return load_tokenizer(name, text=request.text, allow_hub=settings.allow_hub, allowed_folders=folders)


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
