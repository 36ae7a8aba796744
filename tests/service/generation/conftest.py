"""A generation with a real engine process, shared by the tests of a file: torch takes seconds to load."""

import asyncio
from collections.abc import Iterator

import pytest

from service.generation.admission import Generation
from tests.service.generation.generations import Run, settings


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def generation(run: Run) -> Iterator[Generation]:
    generation = Generation(settings(engine_max_running=4, engine_max_new_tokens=100_000, engine_wait_seconds=60))
    run(generation.preload())
    yield generation
    run(generation.stop())
