"""The exception for a command that was used wrongly. `main` prints it as one line and exits with code 2."""


class UsageError(Exception):
    """A wrong argument, option or setting; the text says what is wrong and how to correct it."""
