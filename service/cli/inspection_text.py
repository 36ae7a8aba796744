"""The answers of `inspect` and `explain` as tables of the terminal. Knows no connection."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from service.cli import text

if TYPE_CHECKING:
    from nanomoe.config import JobConfig
    from nanomoe.evaluation.explain import LayerExplanation
    from service.http import schemas


def next_tokens_table(last: str, tokens: Iterable[schemas.NextTokenView]) -> Table:
    """The likeliest tokens to follow `last`, the last one that was read."""
    table = text.new_table(f"after {last!r}", ">id", ">probability")
    for token in tokens:
        table.add_row(repr(token.text), str(token.token), text.number(token.probability, 4))
    return table


_N_SHOWN = 3
"""Number of tokens shown for each head: those it attends to most."""


def attention_table(answer: schemas.InspectResponse) -> Table:
    """The tokens that the last token attends to most, for each head."""
    last = len(answer.tokens) - 1
    table = text.new_table("layer", ">head", f"{answer.tokens[last].text!r} attends to")
    for layer, heads in enumerate(answer.attention):
        for head, rows in enumerate(heads):
            most = sorted(range(last + 1), key=lambda t: -rows[last][t])[:_N_SHOWN]
            seen = ", ".join(f"{answer.tokens[t].text!r} {text.number(rows[last][t], 2)}" for t in most)
            table.add_row("" if head else str(layer), str(head), seen)
    return table


def router_table(answer: schemas.InspectResponse) -> Table:
    """The experts that every token read was sent to, in gate order: one row a token, one column a layer."""
    table = text.new_table("read and sent to experts", *(f"layer {layer.layer}" for layer in answer.routing))
    for token in answer.routed_tokens:
        table.add_row(repr(token.text), *(", ".join(map(str, experts)) for experts in token.experts))
    return table


def experts_table(layer: schemas.MixtureLayer, room: int) -> Table:
    """The experts of a layer: share of the load, importance, the loss without each, and the tokens that it was given
    most often, as many as fit into `room` columns."""
    table = text.new_table(f"layer {layer.layer}", ">expert", ">load", ">importance", ">loss without", "top tokens")
    figures = (layer.load, layer.importance, layer.loss_without)
    for expert in range(max(len(found or ()) for found in (*figures, layer.cards))):
        numbers = [text.number(None if of is None else of[expert], 4) for of in figures]
        card = [] if layer.cards is None else layer.cards[expert]
        table.add_row("", str(expert), *numbers, _card_text(card, room - _BEFORE_TOKENS))
    return table


_BEFORE_TOKENS = 52
"""Columns of `experts_table` before the tokens."""


def _card_text(card: Iterable[schemas.CardToken], room: int) -> str:
    """`' uma' 12, ',' 9`: the tokens that fit, with how often each was given."""
    shown = ""
    for one in card:
        more = f"{shown}, {one.token!r} {one.times}".removeprefix(", ")
        if shown and len(more) > room:
            break
        shown = more
    return shown or "–"


def routing_table(layer: LayerExplanation) -> Table:
    """The router's logit, probability, choice and gate of each expert of a layer, and their sums."""
    biased = any(score.balance_bias != 0 for score in layer.experts)
    columns = [f"layer {layer.layer}", ">expert", ">logit", ">probability", ">choice", ">gate"]
    table = text.new_table(*columns, *([">balance bias"] if biased else []))
    for score in layer.experts:
        is_chosen = score.gate is not None
        cells = [
            "",
            str(score.expert),
            text.number(score.logit, 4),
            text.number(score.probability, 4),
            str(layer.chosen.index(score.expert) + 1) if is_chosen else "–",
            text.number(score.gate, 4),
        ]
        table.add_row(
            *cells, *([text.number(score.balance_bias, 4)] if biased else []), style=text.GOOD if is_chosen else None
        )
    table.add_row(
        "", "sum", "", text.number(sum(s.probability for s in layer.experts), 4), "", text.number(layer.gate_sum, 4)
    )
    return table


def gates_line(layer: LayerExplanation, config: JobConfig) -> Text:
    """The computation of the gates, with the numbers: `gates: 0.2561 / 0.4563 = 0.5612, ...`."""
    chosen = [layer.experts[expert] for expert in layer.chosen]
    total = sum(score.probability for score in chosen)
    if config.renormalises_gates:
        terms = [f"{score.probability:.4f} / {total:.4f} = {score.gate:.4f}" for score in chosen]
        origin = "each probability over the sum of the chosen ones"
    else:
        terms = [f"{score.gate:.4f}" for score in chosen]
        origin = "the probabilities as they are" if config.router_score == "softmax" else "the sigmoid of each logit"
    shared = f"; {layer.shared_experts} shared beside them" if layer.shared_experts else ""
    return Text(f"gates: {', '.join(terms)} ({origin}){shared}", text.DIM)
