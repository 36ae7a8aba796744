"""Makes the `place` fixture known to the tests of faults."""

from tests.worker.workplace import place

__all__ = ["place"]
