"""The tree that the docstring draws is the tree that the code has."""

import inspect
import re

from service import errors
from service.errors import ServiceError


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn: dict[str, tuple[str, int | None]] = {}
    above: list[str] = ["Exception"]
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"    ((?:\|?\s+)*)\+-- (\w+)\s+(\d{3})?", line):
            depth = len(found[1]) // 4 + 1
            drawn[found[2]] = (above[depth - 1], int(found[3]) if found[3] else None)
            above[depth:] = [found[2]]
    real = dict(
        inspect.getmembers(errors, lambda member: inspect.isclass(member) and member.__module__ == errors.__name__)
    )
    assert drawn.keys() == real.keys()
    for name, (parent, status) in drawn.items():
        assert real[name].__base__.__name__ == parent
        if status is not None:
            assert real[name].status == status


def test_an_error_holds_everything_for_its_response() -> None:
    error = errors.TooManyRequests("queue_full", "10 jobs wait", errors=[{"loc": ["body"], "msg": "m"}], retry_after=60)
    assert isinstance(error, ServiceError)
    assert (error.status, error.code, error.detail, error.retry_after) == (429, "queue_full", "10 jobs wait", 60)
    assert error.errors == [{"loc": ["body"], "msg": "m"}]
    assert str(error) == "10 jobs wait"
