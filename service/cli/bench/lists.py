"""Lists of numbers and of names, as options give them."""

from service.cli.usage_error import UsageError


def numbers(option: str, given: str, largest: int = 1_000_000) -> tuple[int, ...]:
    """The numbers of `1,8,32`. Raises UsageError."""
    try:
        listed = tuple(int(number) for number in given.split(","))
    except ValueError:
        raise UsageError(f"{option} {given!r} must look like 1,8,32") from None
    if not all(0 < number <= largest for number in listed):
        raise UsageError(f"{option} {given!r}: numbers from 1 to {largest:,}")
    return listed


def names(option: str, given: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The names of `one,other`, each of which must be known. Raises UsageError."""
    listed = tuple(name.strip() for name in given.split(","))
    if unknown := set(listed) - set(known):
        raise UsageError(f"{option} {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    return listed
