"""What an owner may use at most: declared here, set with `nanomoe keys create`, enforced in `service.jobs.quotas`."""

from collections.abc import Iterable
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Quotas(BaseModel):
    """The limits of an owner, over all of the owner's keys; null is no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    queued_jobs: int | None = Field(None, ge=0)
    """Most jobs that wait, queued or paused."""

    running_jobs: int | None = Field(None, ge=0)
    """Most jobs that run at once; further ones wait in the queue."""

    device_seconds_per_day: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Most seconds of training in any 24 hours. Once they are used, jobs wait; one that runs goes on."""

    bytes_stored: int | None = Field(None, ge=0)
    """Most bytes of texts and checkpoints. Once they are used, no job is accepted; one that runs goes on."""

    @classmethod
    def parse(cls, given: Iterable[str]) -> Self:
        """Quotas given as `NAME=VALUE` each. Raises ValueError, which names the quota and the fault."""
        values: dict[str, str] = {}
        for one in given:
            name, equals, value = one.partition("=")
            if not equals or name not in cls.model_fields:
                raise ValueError(f"{one!r} is not NAME=VALUE with a name of {', '.join(cls.model_fields)}")
            values[name] = value
        try:
            return cls.model_validate_strings(values)
        except ValidationError as error:
            (fault, *_) = error.errors(include_url=False)
            raise ValueError(f"{fault['loc'][0]}: {fault['msg']}") from None

    @property
    def given(self) -> dict[str, float]:
        """The limits that are set, by name."""
        return self.model_dump(exclude_none=True)
