"""Tables of a report, as HTML."""

from collections.abc import Iterable, Sequence
from html import escape

from service.http.schemas import Spread
from service.report.labels import figure
from service.report.svg import colour_of


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, n_texts: int) -> str:
    """A table of cells that are HTML already; the first `n_texts` columns are texts, the others figures."""
    kinds = ["left"] * n_texts + ["right"] * (len(head) - n_texts)

    def line(cells: Sequence[str], name: str) -> str:
        marked = (f'<{name} style="text-align:{side}">{cell}</{name}>' for cell, side in zip(cells, kinds, strict=True))
        return f"<tr>{''.join(marked)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line([escape(name) for name in head], 'th')}</thead><tbody>{body}</tbody></table>"


def spread(found: Spread | None) -> str:
    """Mean and standard deviation."""
    if found is None:
        return "–"
    return figure(found.mean) if found.std is None else f"{figure(found.mean)} <small>± {figure(found.std, 2)}</small>"


def swatch(index: int) -> str:
    """A square in the colour of a curve."""
    style = f"display:inline-block;width:10px;height:10px;border-radius:3px;background:{colour_of(index)}"
    return f'<span style="{style}"></span> '
