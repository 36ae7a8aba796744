"""Where a process dies next. Its lines are what it tells others: a message to its supervisor, a step of the commit of a
folder, a statement to the database.
"""

import os
import signal
from pathlib import Path


class NextDeath:
    """An order to die, in a file that whoever orders it and whoever obeys it have in common. One process obeys it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._order = ""
        self._left = 0

    def order(self, line: int) -> None:
        """Let a process be killed before its line of this number, counted from 1 at the order."""
        prepared = self._file.with_suffix(".new")
        prepared.write_text(f"{line} {os.urandom(8).hex()}")
        prepared.rename(self._file)

    def happened(self) -> bool:
        """Whether the order was obeyed."""
        return not self._file.exists()

    def withdraw(self) -> bool:
        """Withdraw the order; False where it was obeyed before."""
        return self._take()

    def line(self) -> None:
        """To be called before each line."""
        try:
            order = self._file.read_text()
        except FileNotFoundError:
            return
        if order != self._order:
            self._order, self._left = order, int(order.split()[0])
        self._left -= 1
        if self._left <= 0 and self._take():
            os.kill(os.getpid(), signal.SIGKILL)

    def _take(self) -> bool:
        try:
            self._file.rename(self._file.with_suffix(f".{os.getpid()}"))
        except FileNotFoundError:
            return False
        return True
