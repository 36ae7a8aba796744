"""The checkpoints that one generation request names: which they are, and how they continue its prompt side by side.

Knows no route.
"""

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

from service.database.database import Database
from service.errors import Conflict, NotFound, ServiceError
from service.generation.admission import EngineResult, Generation, Summary
from service.generation.merged import merged
from service.generation.messages import Chunk, EngineRequest
from service.http.schemas import GenerateRequest
from service.jobs.addressing import Address, find_checkpoints, first_undamaged

AT_ONCE = 4
"""Most checkpoints of one request in the engine at a time: each stays loaded while it is continued from."""


def find_targets(db: Database, asked: GenerateRequest) -> list[list[Address]]:
    """The checkpoints of each target, as `find_checkpoints` returns them.

    Raises:
        NotFound: `job_not_found`, `checkpoint_not_found`.
        Conflict: `no_checkpoint_yet`, `ambiguous_job`.
            With `targets`, the error is that of the first that is refused, and names each that is.
    """
    found: list[list[Address]] = []
    refused: list[tuple[int, ServiceError]] = []
    for n, target in enumerate(asked.checkpoints):
        try:
            found.append(find_checkpoints(db, target.job_id, target.checkpoint))
        except (NotFound, Conflict) as error:
            refused.append((n, error))
    if refused:
        _, first = refused[0]
        if asked.targets is not None:
            first.errors = [_fault(n, error) for n, error in refused]
        raise first
    return found


def _fault(n: int, error: ServiceError) -> dict[str, object]:
    return {"loc": ["body", "targets", n], "msg": error.detail}


@dataclass(frozen=True)
class Target:
    """A checkpoint that continues the request's prompt."""

    generation: Generation
    addresses: Sequence[Address]
    """The checkpoint, and those that stand in for it where it is damaged."""

    request_of: Callable[[Address], EngineRequest]
    place: int | None
    """Its number among several targets, from 0; None where it is alone."""

    @property
    def _follows(self) -> bool:
        return bool(self.place)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """A conflict in the block, such as a damaged checkpoint, names the target."""
        try:
            yield
        except Conflict as error:
            if self.place is not None:
                error.errors = [_fault(self.place, error)]
            raise

    async def finish(self) -> AsyncGenerator[tuple[Address, EngineResult]]:
        """The checkpoint that was used, and all of its continuations: one item."""
        with self._named():
            yield await first_undamaged(
                self.addresses, lambda one: self.generation.generate(self.request_of(one), follows=self._follows)
            )

    async def stream(self) -> AsyncGenerator[tuple[Address, Chunk | Summary]]:
        """The checkpoint that is used, with what its continuations gain, and at the end with the summary."""

        async def begin(address: Address) -> tuple[Chunk | Summary, AsyncGenerator[Chunk | Summary]]:
            items = self.generation.stream(self.request_of(address), follows=self._follows)
            return await anext(items), items

        with self._named():
            address, (first, items) = await first_undamaged(self.addresses, begin)
        async with aclosing(items):
            yield address, first
            async for item in items:
                yield address, item


@dataclass(frozen=True)
class Gain:
    """What one target has gained, or its summary at its end."""

    target: int
    """Number of the target, from 0."""

    address: Address
    item: Chunk | Summary


async def finish_all(targets: Sequence[Target], *, at_once: int) -> list[tuple[Address, EngineResult]]:
    """The checkpoint that each target used, and its continuations, in order. One that fails ends all.

    The first is admitted or refused as a request of its own; the others follow, at most `at_once` in the engine at a
    time, and never more than `AT_ONCE`. Raises what `Generation.stream` raises.
    """
    opened = [target.finish for target in targets]
    found: dict[int, tuple[Address, EngineResult]] = {}
    async with aclosing(merged(opened, at_once=min(AT_ONCE, at_once))) as items:
        async for n, item in items:
            found[n] = item
    return [found[n] for n in range(len(targets))]


async def continue_all(targets: Sequence[Target], *, at_once: int) -> AsyncGenerator[Gain]:
    """What the targets gain, as it comes; otherwise as `finish_all`. Closing the generator cancels all of them."""
    opened = [target.stream for target in targets]
    async with aclosing(merged(opened, at_once=min(AT_ONCE, at_once))) as items:
        async for n, (address, item) in items:
            yield Gain(n, address, item)
