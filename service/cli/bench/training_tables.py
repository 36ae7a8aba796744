"""The results of `nanomoe bench train` as tables of the terminal."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.table import Table

from service.cli import text

if TYPE_CHECKING:
    from nanomoe.bench.training.cohort import CohortFigures
    from nanomoe.bench.training.evaluation import EvaluationShare
    from nanomoe.bench.training.growth import Point
    from nanomoe.bench.training.steps import StepFigures

_NONE = "-"


def steps_table(figures: Iterable["StepFigures"]) -> Table:
    """One row for each shape and way of doing its steps: how many times as fast as each peer, how many limits long."""
    figures = list(figures)
    peers = list(dict.fromkeys(one.who for each in figures for one in each.measured if one.is_peer))
    table = text.new_table(
        "step", "by", ">threads", ">ms", ">tok/s", *(f">x {peer}" for peer in peers), ">limits", ">MFU", ">of dense",
        ">loss",
    )  # fmt: skip
    for each in figures:
        for one in each.measured:
            ratios = (one.times_as_fast_as.get(peer) for peer in peers)
            table.add_row(
                each.shape,
                one.who,
                str(one.n_threads),
                f"{1e3 * one.seconds:,.2f}",
                f"{one.tok_per_sec:,.0f}",
                *(_NONE if ratio is None else f"{ratio:.2f}" for ratio in ratios),
                f"{one.over_limit:.1f}",
                f"{one.mfu:.1%}",
                _NONE if one.over_dense is None else f"{one.over_dense:.2f}",
                f"{one.loss:.4f}",
            )
    return table


def limits_table(figures: Iterable["StepFigures"]) -> Table:
    """What the limit of each shape consists of."""
    table = text.new_table(
        "step", "products in", ">limit, ms", ">products, ms", ">GFLOP", ">GFLOP/s", ">at best", ">update, MB", ">GB/s"
    )  # fmt: skip
    for each in figures:
        for precision, limit in each.limits.items():
            table.add_row(
                each.shape,
                precision,
                f"{1e3 * limit.seconds:.2f}",
                f"{1e3 * limit.products_seconds:.2f}",
                f"{limit.products_flops / 1e9:.2f}",
                f"{limit.products_flops / limit.products_seconds / 1e9:,.0f}",
                f"{limit.peak_flops_per_sec / 1e9:,.0f}",
                f"{limit.update_bytes / 1e6:,.0f}",
                f"{limit.bytes_per_sec / 1e9:,.1f}",
            )
    return table


def evaluation_table(shares: Iterable["EvaluationShare"]) -> Table:
    """One row for each length of the text."""
    table = text.new_table(">text, tokens", ">steps", ">trained tokens", ">steps alone", ">job", ">not training")
    for one in shares:
        table.add_row(
            f"{one.n_tokens:,}",
            f"{one.n_steps:,}",
            f"{one.n_trained_tokens:,}",
            f"{one.steps_seconds:.1f} s",
            f"{one.job_seconds:.1f} s",
            f"{one.share:.1%}",
        )
    return table


def growth_table(points: Iterable["Point"]) -> Table:
    """One row for each value of each axis."""
    table = text.new_table("growth over", ">value", "by", ">µs per token")
    for one in points:
        table.add_row(one.axis, str(one.value), one.way, f"{1e6 * one.seconds_per_token:.1f}")
    return table


def cohort_table(figures: Iterable["CohortFigures"]) -> Table:
    """One row for each shape and number of members."""
    table = text.new_table(
        "jobs together", ">members", ">ms alone", ">threads alone", ">ms a step together", ">times as fast"
    )
    for one in figures:
        table.add_row(
            one.shape,
            str(one.n_members),
            f"{1e3 * one.seconds_alone:,.2f}",
            str(one.n_threads_alone),
            f"{1e3 * one.seconds_together:,.2f}",
            f"{one.times_as_fast:.2f}",
        )
    return table
