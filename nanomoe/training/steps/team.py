"""Threads that do one micro-batch together: all run one program, each on its share of rows, heads or weights."""

from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import TypeVar

import torch

from nanomoe.compiling import thread_pool

A = TypeVar("A")
R = TypeVar("R")


class _OtherFailed(Exception):
    """Another thread raised an error and will never arrive."""


class Team:
    """So many threads; the calling one is the first of them."""

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self._connect()

    def run(self, program: Callable[[int], R]) -> list[R]:
        """What the program returns in each thread, which it is told the number of, from 0.

        A product of torch takes one thread meanwhile: whoever shares the rows has no use for more.

        Raises:
            What the program raised in one of them; the others come no further than their next `wait`.
        """
        before = torch.get_num_threads()
        others = [thread_pool().submit(self._run, program, number) for number in range(1, self.n_threads)]
        errors: list[BaseException] = []
        results: list[R] = []
        try:
            results.append(self._run(program, 0))
        except BaseException as error:
            errors.append(error)
        finally:
            torch.set_num_threads(before)
        for other in others:
            try:
                results.append(other.result())
            except BaseException as error:
                errors.append(error)
        if errors:
            self._connect()
            raise next((error for error in errors if not isinstance(error, _OtherFailed)), errors[0])
        return results

    def wait(self, number: int) -> None:
        """Wait, as the thread of this number, until every other has come here."""
        self._arrive(number, True)
        for arrivals in self._from[number]:
            if not arrivals.get():
                raise _OtherFailed

    def share(self, n: int, number: int) -> slice:
        """The part of range(n) that is the thread's of this number."""
        return slice(n * number // self.n_threads, n * (number + 1) // self.n_threads)

    def distribute(self, tasks: Iterable[A], size: Callable[[A], int]) -> list[list[A]]:
        """The tasks of each thread: the largest first, each to the thread that has least to do."""
        of_thread: list[list[A]] = [[] for _ in range(self.n_threads)]
        loads = [0] * self.n_threads
        for task in sorted(tasks, key=size, reverse=True):
            idlest = loads.index(min(loads))
            of_thread[idlest].append(task)
            loads[idlest] += size(task)
        return of_thread

    def _connect(self) -> None:
        """Each thread tells each other one that it has arrived: there is no barrier in the standard library whose every
        wait does not cost as much as a small product."""
        numbers = range(self.n_threads)
        channels = {(a, b): SimpleQueue[bool]() for a in numbers for b in numbers if a != b}
        self._to = [[channels[a, b] for b in numbers if a != b] for a in numbers]
        self._from = [[channels[b, a] for b in numbers if a != b] for a in numbers]

    def _arrive(self, number: int, goes_on: bool) -> None:
        for channel in self._to[number]:
            channel.put(goes_on)

    def _run(self, program: Callable[[int], R], number: int) -> R:
        torch.set_num_threads(1)
        try:
            return program(number)
        except BaseException:
            self._arrive(number, False)
            raise
