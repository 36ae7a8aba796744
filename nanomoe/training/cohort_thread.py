"""The thread that makes checkpoints and snapshots of the runs of a cohort beside their steps; checkpoints of runs that
one program trains are evaluated together, in the same passes.

What was begun since the last `start` is one batch: the runs of a program come to a quarter in the same step, so all of
them have begun before whoever advances them starts it.
"""

import logging
from collections.abc import Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from nanomoe.evaluation.evaluate import Measured
from nanomoe.evaluation.evaluated_text import RaiseIfStopped
from nanomoe.evaluation.together import Evaluated, measure_together, models_at_once
from nanomoe.training.beside import Launched, Made, Make, Recording
from nanomoe.training.memory import is_out_of_memory
from nanomoe.training.run import Warned
from nanomoe.training.steps.stacked import Lane

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Begun:
    make: Make
    raise_if_abandoned: RaiseIfStopped
    after: Launched
    future: Future[Sequence[Made]]

    def settle(self, measured: Measured | None, warnings: Sequence[Warned] = ()) -> None:
        """Make it, of what was measured already if anything was; whoever collects it gets what that raises."""
        try:
            with self.after.followed():
                self.raise_if_abandoned()
                if measured is None:
                    made = self.make(self.raise_if_abandoned)
                else:
                    assert isinstance(self.make, Recording), "nothing else is measured"
                    made = self.make(self.raise_if_abandoned, measured)
            self.future.set_result([*made, *warnings])
        except BaseException as error:
            self.future.set_exception(error)


class CohortThread:
    """See `nanomoe.training.beside.SharedThread`."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "cohort-beside")
        self._begun: list[_Begun] = []
        self._under_way: set[Future[Sequence[Made]]] = set()
        """What was started, and as far as is known is not made."""
        self._told: set[str] = set()
        """What was logged once."""

    def begin(self, make: Make, raise_if_abandoned: RaiseIfStopped, after: Launched) -> Future[Sequence[Made]]:
        """Have it made after the next `start`."""
        begun = _Begun(make, raise_if_abandoned, after, Future())
        self._begun.append(begun)
        return begun.future

    def start(self) -> None:
        """Have all made that was begun since the last call."""
        begun, self._begun = self._begun, []
        if begun:
            self._under_way |= {one.future for one in begun}
            self._pool.submit(self._make_all, begun)

    def wait(self, seconds: float) -> None:
        """Wait until something is made, and no longer than that. What was begun is started if nothing else is under
        way: whoever waits for that would wait for ever."""
        if all(future.done() for future in self._under_way):
            self.start()
        _, self._under_way = wait_for(self._under_way, seconds, FIRST_COMPLETED)

    def close(self) -> None:
        """Wait for what is under way. What was begun and not started is not made."""
        self._pool.shutdown()

    def _make_all(self, batch: Sequence[_Begun]) -> None:
        try:
            self._make(batch)
        except BaseException as error:  # a bug: nobody is to wait for ever
            for begun in batch:
                if not begun.future.done():
                    begun.future.set_exception(error)

    def _make(self, batch: Sequence[_Begun]) -> None:
        groups: dict[Hashable, list[_Begun]] = {}
        for place, begun in enumerate(batch):
            lane = _lane(begun.make)
            together = place if lane is None else (lane.program, _evaluated(begun.make).shape)
            groups.setdefault(together, []).append(begun)
        for group in groups.values():
            lane = _lane(group[0].make)
            width = 1 if lane is None else models_at_once(_evaluated(group[0].make), lane.program.width)
            if lane is not None and width == 1 and lane.program.width > 1:
                self._tell("evaluated_one_by_one: a pass holds the windows of one model only")
            for first in range(0, len(group), width):
                self._record(group[first : first + width], width)
        if sum(_lane(group[0].make) is not None for group in groups.values()) > 1:
            self._tell("evaluated_in_groups: texts, or what is evaluated, are of several shapes")

    def _record(self, part: Sequence[_Begun], width: int) -> None:
        """Make some things, which passes of so many models evaluate; where it is 1, each by itself."""
        if width == 1:
            for begun in part:
                begun.settle(None)
            return
        try:
            with ExitStack() as follows:
                for begun in part:
                    follows.enter_context(begun.after.followed())
                measured = measure_together([_evaluated(begun.make) for begun in part], width, _raiser(part))
        except CancelledError as error:
            for begun in part:
                begun.future.set_exception(error)
            return
        except Exception as error:
            if len(part) == 1 and not is_out_of_memory(error):
                part[0].future.set_exception(error)
                return
            message = f"{len(part)} models in passes of {width}: {error}"
        else:
            for begun, own in zip(part, measured, strict=True):
                begun.settle(own)
            return
        # Only here is the memory of what failed free.
        if len(part) > 1:  # the fault of one, perhaps; the others have the same figures in passes as wide
            log.warning("evaluated_again: %s", message)
            for begun in part:
                self._record([begun], width)
        else:
            log.warning("evaluated_alone: %s", message)
            part[0].settle(None, [Warned("evaluated_alone", f"memory ran out for {message}")])

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            log.warning(message)


def _lane(make: Make) -> Lane | None:
    """The lane of the run whose checkpoint is to be made; None where there is none, and for a snapshot."""
    return make.run.step if isinstance(make, Recording) and isinstance(make.run.step, Lane) else None


def _evaluated(make: Make) -> Evaluated:
    assert isinstance(make, Recording), "nothing else is evaluated"
    make.run.build_model()
    return Evaluated(make.run.model, make.run.text, make.run.val_text, make.run.config)


def _raiser(part: Sequence[_Begun]) -> RaiseIfStopped:
    """Raises once all of them are abandoned."""

    def raise_if_all_are_abandoned() -> None:
        for begun in part:
            with suppress(CancelledError):
                begun.raise_if_abandoned()
                return
        raise CancelledError

    return raise_if_all_are_abandoned
