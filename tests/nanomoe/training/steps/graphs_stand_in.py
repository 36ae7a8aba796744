"""CUDA graphs on a CPU: what is captured is recorded, operator by operator, and a replay does the operators again.

As on a GPU, a capture does nothing; a replay reads and writes the very memory of the capture, and takes every number
that came from the host as it was then; nothing that the work allocated survives from one replay to the next: before
each it is overwritten with rubbish. What a GPU would refuse raises an error: reading a number back, a shape that
depends on numbers, numbers drawn by torch's own generators, a tensor that was made on the host during the capture.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

RUBBISH = 0xA5
WARM_UPS = 1
"""One shows which memory the work uses and what it changes; a GPU has another for what its libraries allocate."""

INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


@dataclass(frozen=True)
class Call:
    """An operator, with what it was called with and the tensors that it made."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: list[Tensor]
    writes: bool
    """Whether it writes to what it is called with."""

    def again(self) -> None:
        if not self.writes and not self.made:
            return  # a view: it lies where it lay
        results = [one for one in tree_leaves(self.operator(*self.args, **self.kwargs)) if isinstance(one, Tensor)]
        if self.made:
            for there, result in zip(self.made, results, strict=True):
                there.copy_(result)


class Recorder(TorchDispatchMode):
    """Records the operators that are done within it.

    `known`: the memory that captured work may read, by address; None lets it read any.
    """

    def __init__(self, known: dict[int, Any] | None = None) -> None:
        super().__init__()
        self.known = known
        self.calls: list[Call] = []
        self.seen: dict[int, Any] = {}
        self.made: dict[int, Any] = {}
        self.before: dict[int, tuple[Any, Any]] = {}
        """Memory that was there before and is written to, and its copy."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        refuse(operator, args, kwargs)
        given = dict(memory_of((args, kwargs)))
        for key, storage in given.items():
            self.seen[key] = storage
            if self.known is not None and key not in self.known and key not in self.made:
                raise RuntimeError(f"{operator}: the host made a tensor during the capture")
        written = dict(written_to(operator, args, kwargs))
        for key, storage in written.items():
            if key not in self.made and key not in self.before:
                self.before[key] = storage, storage.clone()
        results = operator(*args, **kwargs)
        made = [one for one in tree_leaves(results) if isinstance(one, Tensor) and key_of(one) not in given]
        self.made |= {key_of(one): one.untyped_storage() for one in made}
        self.calls.append(Call(operator, args, kwargs, made, bool(written)))
        return results

    def undo(self) -> None:
        """Put back what was there before."""
        for storage, before in self.before.values():
            storage.copy_(before)


def refuse(operator: Any, args: Any, kwargs: Any) -> None:
    """Raise what a capture raises."""
    name, tags = operator.name().partition(".")[0], operator.tags
    if torch.Tag.data_dependent_output in tags:
        raise RuntimeError(f"{operator}: a capture cannot wait for a number")
    indexes_by_numbers = name in INDEXING and not any(
        isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in tree_leaves(args[1])
    )
    if torch.Tag.dynamic_output_shape in tags and not indexes_by_numbers:
        raise RuntimeError(f"{operator}: a capture cannot wait for a shape")
    if torch.Tag.nondeterministic_seeded in tags and "scaled_dot_product" not in name:
        raise RuntimeError(f"{operator}: draws from a generator that the capture does not know")
    if name == "aten::lift_fresh":
        raise RuntimeError(f"{operator}: the host made a tensor during the capture")


def key_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def memory_of(tree: Any) -> Iterator[tuple[int, Any]]:
    for one in tree_leaves(tree):
        if isinstance(one, Tensor):
            yield key_of(one), one.untyped_storage()


def written_to(operator: Any, args: Any, kwargs: Any) -> Iterator[tuple[int, Any]]:
    for place, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from memory_of(kwargs.get(argument.name, args[place] if place < len(args) else None))


@dataclass(frozen=True)
class RecordedProgram:
    """Operators to be done again."""

    calls: list[Call]
    graphs: "RecordedGraphs"

    def replay(self) -> None:
        self.graphs.n_replays += 1
        for storage in self.graphs.pool.values():
            storage.fill_(RUBBISH)
        with torch.no_grad(), _disable_current_modes():  # what a kernel reads, the host does not
            for call in self.calls:
                call.again()


@dataclass
class RecordedGraphs:
    """Stands in for `nanomoe.cuda_graphs.CudaGraphs`."""

    device: torch.device
    n_captures: int = 0
    n_warm_ups: int = 0
    n_replays: int = 0
    pool: dict[int, Any] = field(default_factory=dict)
    """The memory that captured work allocated."""

    def capture(
        self, work: Callable[[], None], unchanged: Sequence[Tensor] = (), *, is_warm: bool = False
    ) -> RecordedProgram:
        before = [tensor.clone() for tensor in unchanged]
        known: dict[int, Any] = {}
        for _ in range(0 if is_warm else WARM_UPS):
            with Recorder() as warm_up:
                work()
            self.n_warm_ups += 1
            known |= warm_up.seen | warm_up.made
        for tensor, kept in zip(unchanged, before, strict=True):
            tensor.copy_(kept)
        recorder = Recorder(None if is_warm else known)
        try:
            with recorder:
                work()
        finally:
            recorder.undo()
        self.n_captures += 1
        self.pool |= recorder.made
        return RecordedProgram(recorder.calls, self)

    def limit_lead(self) -> None:
        """Nothing runs ahead."""


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads."""

    n = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += operator is torch.ops.aten._local_scalar_dense.default
        return operator(*args, **(kwargs or {}))
