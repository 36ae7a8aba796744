"""Threads that do one micro-batch together: all run one program, each on its share of rows, heads or weights."""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from nanomoe.compiling import thread_pool

R = TypeVar("R")


class Team:
    """So many threads; the calling one is the first of them."""

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self._barrier = threading.Barrier(n_threads)

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
            self._barrier.reset()
            raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
        return results

    def wait(self) -> None:
        """Wait until every thread has come here."""
        if self.n_threads > 1:
            self._barrier.wait()

    def share(self, n: int, number: int) -> slice:
        """The part of range(n) that is the thread's of this number."""
        return slice(n * number // self.n_threads, n * (number + 1) // self.n_threads)

    def _run(self, program: Callable[[int], R], number: int) -> R:
        torch.set_num_threads(1)
        try:
            return program(number)
        except BaseException:
            self._barrier.abort()
            raise
