"""What the person at the keyboard got wrong. Shown as one line, exit code 2."""


class Mistake(Exception):
    """Its text says what is wrong and what to do."""
