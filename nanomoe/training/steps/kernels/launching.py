"""How kernels become operators of torch, and into how many programs their work is cut."""

from collections.abc import Callable
from typing import Any

import torch
import triton

_LIBRARY = torch.library.Library("nanomoe", "FRAGMENT")

OPTIONS = {"enable_fp_fusion": True}
"""Options of every launch. Products and sums are one instruction, said here because Triton's default changes."""

_MOST_PARTS = 128
"""Programs that each sum up rows of their own: about as many as a large GPU has processors. Assumed."""


def operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function that launches kernels the operator `nanomoe::NAME` of torch, called as `schema` says."""

    def register(launch: Callable[..., Any]) -> Callable[..., Any]:
        name = _LIBRARY.define(schema)
        _LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
        registered: Callable[..., Any] = getattr(torch.ops.nanomoe, schema.partition("(")[0]).default
        return registered

    return register


def n_parts(n_rows: int) -> int:
    """Programs among which rows are shared whose sums are wanted."""
    return min(n_rows, _MOST_PARTS)


def power_of_two(n: int, least: int = 1) -> int:
    """The least power of two that holds `n` numbers: blocks have such widths, and mask what lies beyond."""
    width: int = max(least, triton.next_power_of_2(n))
    return width
