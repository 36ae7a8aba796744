"""Makes the `place` fixture known to the tests of the worker."""

from tests.worker.workplace import place

__all__ = ["place"]
