"""The trainer's pipe to its supervisor: messages about the process, and about each of its jobs."""

import os
import threading

from worker.protocol import AboutJob, Assignment, FromTrainer, encode_from_trainer


class Channel:
    """The pipe to the supervisor. Only messages are written to it: whatever else prints to stdout goes to the log."""

    def __init__(self) -> None:
        self._pipe = os.dup(1)
        os.dup2(2, 1)
        self._mutex = threading.Lock()

    def send(self, message: FromTrainer, assignment: Assignment | None = None) -> None:
        """Write one message, about this attempt or about none, as one line. Thread-safe."""
        line = encode_from_trainer(message, assignment)
        with self._mutex:
            while line:
                line = line[os.write(self._pipe, line) :]


class JobChannel:
    """The channel for the messages about one job."""

    def __init__(self, channel: Channel, assignment: Assignment) -> None:
        self._channel, self._assignment = channel, assignment

    def send(self, message: AboutJob) -> None:
        """`Channel.send` of a message about this job."""
        self._channel.send(message, self._assignment)
