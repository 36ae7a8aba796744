"""The points of the commit of a folder, at which a test can let the process die."""


def reached(point: str) -> None:
    """Does nothing. The commit calls it between its steps: `wrote NAME`, `flushed`, `renamed`."""
