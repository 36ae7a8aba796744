"""How a text of N tokens becomes windows, steps, epochs and quarters: arithmetic only, known before anything is built.

Knows no torch; the service refuses and estimates jobs with it, and the training loop follows it.
"""

from dataclasses import dataclass
from typing import Self

from nanomoe.config import PERCENTS, JobConfig
from nanomoe.errors import NanomoeError


class TextTooShort(NanomoeError, ValueError):
    """The text has fewer tokens than training, or the held-out part, needs."""

    code = "text_too_short"


class OutOfMemory(NanomoeError, RuntimeError):
    """A step does not fit the memory, however it is cut."""

    code = "out_of_memory"


EVALUATED_SHARE = 0.03
"""Targets of an evaluation per target trained on, by default. A target that is evaluated costs a third of one that is
trained on, so that five evaluations cost a twentieth of the training."""

LEAST_EVALUATED, MOST_EVALUATED = 8192, 65_536
"""Bounds of the targets of an evaluation, by default."""


def n_windows(n_tokens: int, block_size: int) -> int:
    """Windows that cover a text: one if it fits the context, else ceil((N - 1) / B)."""
    return 1 if n_tokens <= block_size else -(-(n_tokens - 1) // block_size)


def n_val_tokens(n_tokens: int, val_fraction: float) -> int:
    """Tokens held out at the end of the text: floor(f * N), at least 2 when anything is held out."""
    return max(2, int(val_fraction * n_tokens)) if val_fraction > 0 else 0


@dataclass(frozen=True)
class Plan:
    """The steps of a job."""

    n_train_tokens: int
    n_val_tokens: int
    n_windows: int
    """Training windows, each seen once an epoch."""
    steps_per_epoch: int
    total_steps: int

    @classmethod
    def of(cls, config: JobConfig, n_tokens: int) -> Self:
        """The plan of `config` on a text of `n_tokens` tokens.

        Raises:
            TextTooShort: fewer than 2 tokens are left to train on.
        """
        held_out = n_val_tokens(n_tokens, config.val_fraction)
        n_train = n_tokens - held_out
        if n_train < 2:
            held = f", of which val_fraction {config.val_fraction:g} holds out {held_out}" if held_out else ""
            raise TextTooShort(f"training needs at least 2 tokens; the text has {n_tokens}{held}")
        windows = n_windows(n_train, config.block_size)
        steps_per_epoch = -(-windows // (config.batch_size * config.gradient_accumulation_steps))
        total = config.epochs * steps_per_epoch
        if config.max_steps is not None:
            total = min(total, config.max_steps)
        return cls(n_train, held_out, windows, steps_per_epoch, total)

    def halved(self, micro_batch: int, config: JobConfig) -> int:
        """Windows computed together after `micro_batch` of them did not fit the memory. A step still trains on the same
        windows, in more parts.

        Raises:
            OutOfMemory: there is one window only, or a smaller micro-batch would train on something else.
        """
        size = min(micro_batch, self.n_windows)
        if size == 1:
            raise OutOfMemory(f"not even one window of {min(self.n_train_tokens, config.block_size)} tokens fits")
        if config.capacity_factor is not None:
            raise OutOfMemory(
                f"a micro-batch of {size} windows does not fit, and with capacity_factor a smaller one would drop "
                "other tokens"
            )
        return -(-size // 2)

    @property
    def quarters(self) -> dict[int, int]:
        """{step: percent} of the checkpoints, after ceil(percent * total / 100) steps; where two fall on one step, the
        higher percent."""
        return {-(-percent * self.total_steps // 100): percent for percent in PERCENTS}

    def n_trained_targets(self, config: JobConfig) -> int:
        """Targets that the job trains on, each as often as it is."""
        epochs, steps = divmod(self.total_steps, self.steps_per_epoch)
        per_step = config.batch_size * config.gradient_accumulation_steps * config.block_size
        in_epoch = self.n_train_tokens - 1
        return epochs * in_epoch + min(steps * per_step, in_epoch)

    def eval_max_tokens(self, config: JobConfig) -> int:
        """Most targets that an evaluation measures, of the training text and of the held-out one: the config's
        `eval_max_tokens`, or its default for this text."""
        if config.eval_max_tokens is not None:
            return config.eval_max_tokens
        share = round(EVALUATED_SHARE * self.n_trained_targets(config))
        return min(max(share, LEAST_EVALUATED), MOST_EVALUATED)

    def epoch_of(self, step: int) -> int:
        """Epochs completed or under way after `step` steps; 0 before the first."""
        return -(-step // self.steps_per_epoch)
