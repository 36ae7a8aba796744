"""The engine's server, driven turn by turn in the test's process."""

import io
import os
import threading

from nanomoe.config import SamplingConfig
from nanomoe.generation.engine import Request, generate_reference
from service.generation.checkpoint_cache import CheckpointCache
from service.generation.engine import Server
from service.generation.messages import (
    Begun,
    Chunk,
    EngineDone,
    EngineRequest,
    EngineStart,
    Failed,
    FromEngine,
    Generate,
    parse_from_engine,
)
from tests.service.tiny_checkpoint import TinyCheckpoint


class Driver:
    """Sends requests to a server and reads its messages."""

    def __init__(self, *, cache_bytes: int = 2**30, max_running: int = 8) -> None:
        self.output = io.BytesIO()
        start = EngineStart(parent=os.getppid(), device="cpu", cache_bytes=cache_bytes, max_running=max_running)
        self.server = Server(start, self.output)
        self._n_read = 0
        self._last_id = 0
        self.sent: dict[int, list[FromEngine]] = {}

    @property
    def cache(self) -> CheckpointCache:
        """The loaded checkpoints."""
        return self.server._cache

    @property
    def n_continuations(self) -> int:
        """Texts that are being generated."""
        return self.server._scheduler.n_continuations

    def ask(self, request: EngineRequest, *, stream: bool = False) -> int:
        """Send a request; returns its id."""
        self._last_id += 1
        self.sent[self._last_id] = []
        self.server.receive(Generate(id=self._last_id, stream=stream, request=request))
        return self._last_id

    def turn(self) -> None:
        """One turn of the server, and read what it has sent."""
        self.server.turn()
        lines = self.output.getvalue()[self._n_read :].splitlines()
        self._n_read = len(self.output.getvalue())
        for line in lines:
            message = parse_from_engine(line)
            assert isinstance(message, Begun | Chunk | EngineDone | Failed)
            self.sent[message.id].append(message)

    def finish(self, *ids: int) -> None:
        """Turn until these requests are answered in full."""
        while not all(self.sent[i] and isinstance(self.sent[i][-1], EngineDone | Failed) for i in ids):
            self.turn()

    def use_loops(self) -> None:
        """Turn until every loaded checkpoint has its loops, without a token more than that takes."""
        for thread in threading.enumerate():
            if thread.name == "loops":
                thread.join()
        self.turn()  # it handles that they are ready
        while any(loaded.lacks_loops for loaded in self.cache._loaded.values()):
            self.turn()
            self.cache._loader.submit(lambda: None).result()
        self.turn()

    def chunks(self, request_id: int) -> list[Chunk]:
        """The chunks that a request was sent."""
        return [message for message in self.sent[request_id] if isinstance(message, Chunk)]


def reference_tokens(
    tiny: TinyCheckpoint, prompt: str, max_new_tokens: int, sampling: SamplingConfig, **fields: int
) -> list[int]:
    """The new tokens that the plain reference gives."""
    request = Request(tiny.tokenizer.encode(prompt), max_new_tokens, sampling, **fields)
    return generate_reference(tiny.weights, tiny.config, request)
