"""Tables and pictures of experiments.md, from runs of the ready experiments.

`nanomoe run NAME` runs one. Then `.venv/bin/python docs/experiments.py` asks the service (NANOMOE_URL) for the newest
sweep of each experiment's name, writes its picture to docs/experiments/ and its table to the page; `--run` first runs
those that are missing.
"""

import argparse
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from service.client import Client, SweepHandle
from service.client.comparison import Comparison
from service.report import svg
from service.report.curve import Curve
from service.report.labels import label_of, value_label

PAGE = Path(__file__).parent / "experiments.md"
PICTURES = Path(__file__).parent / "experiments"


@dataclass(frozen=True)
class Shown:
    """How an experiment is shown."""

    metrics: tuple[str, ...] = ("loss", "perplexity", "accuracy")
    """Figures of the last checkpoint, the columns of the table; those of `dots` are drawn too."""

    perplexity: float | None = None
    """Perplexity for which the table says when the jobs came to it."""

    dots: tuple[str, ...] = ()
    """Figures that are drawn as dots; none: the curves of the training loss are drawn."""


MOE_PERPLEXITY = ("perplexity", "moe.load_cv")
SHOWN: Mapping[str, Shown] = {
    "reference": Shown(),
    "mixture": Shown(("loss", "perplexity", "moe.load_cv")),
    "capacity": Shown(("perplexity", "accuracy"), perplexity=2.0),
    "dropout": Shown(),
    "prefix": Shown(),
    "learning-rate": Shown(perplexity=2.0),
    "long-text": Shown(("loss", "perplexity", "bits_per_byte", "accuracy")),
    "balance": Shown((*MOE_PERPLEXITY, "moe.max_violation", "moe.dead_experts"), dots=MOE_PERPLEXITY),
    "capacity-factor": Shown(
        ("perplexity", "moe.train_dropped_fraction", "moe.load_cv"), dots=("perplexity", "moe.train_dropped_fraction")
    ),
    "tokens-per-expert": Shown(
        (*MOE_PERPLEXITY, "moe.dead_experts", "moe.router_entropy"), dots=("perplexity", "moe.dead_experts")
    ),
}
"""Every experiment, by the name of its preset."""


def spread_cell(values: Sequence[float]) -> str:
    """Mean and sample standard deviation: `0.397 ± 0.004`; the mean alone where there is no deviation."""
    if not values:
        return "–"
    mean, std = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean:.4g}" if std == 0 else f"{mean:.4g} ± {std:.2g}"


def groups_table(found: Comparison, shown: Shown) -> str:
    """A row for each group of jobs that differ only in the seed, as Markdown."""
    until = (f"steps to perplexity {shown.perplexity:g}", "seconds") if shown.perplexity is not None else ()
    names = [name for name in found.parameters if name != "seed"]
    last = {row["job_id"]: row for row in found.last}
    rows = []
    for group in found.groups:
        of_group = [last[job_id] for job_id in group.job_ids]
        reached = [row for row in of_group if row.get("steps_until") is not None]
        cells = [value_label(group.values[name]) for name in names]
        cells.append(str(len(of_group)))
        cells += [spread_cell([row[name] for row in of_group if row[name] is not None]) for name in shown.metrics]
        if until:
            not_all = "" if len(reached) == len(of_group) else f" ({len(reached)} of {len(of_group)})"
            cells.append(spread_cell([row["steps_until"] for row in reached]) + not_all)
            cells.append(spread_cell([row["seconds_until"] for row in reached]))
        rows.append(f"| {' | '.join(cells)} |")
    heads = [*(f"`{name}`" for name in names), "seeds", *(f"`{name}`" for name in shown.metrics), *until]
    return "\n".join([f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}", *rows])


def dots_picture(name: str, found: Comparison, metrics: Sequence[str]) -> str:
    """Some figures of the last checkpoint, a dot for each job."""
    last = {row["job_id"]: row for row in found.last}
    panels = [
        svg.Dots(metric, [[last[job_id][metric] for job_id in group.job_ids] for group in found.groups])
        for metric in metrics
    ]
    return svg.dots(panels, [label_of(group.values) for group in found.groups], title=f"{name}: at 100 %").file()


def n_recalled(text: str, prompt: str, added: str) -> int:
    """How many characters of a continuation are those of the text, from its first on."""
    expected = text[len(prompt) :]
    return next((n for n, (ours, its) in enumerate(zip(added, expected, strict=False)) if ours != its), len(added))


def prefix_results(sweep: SweepHandle) -> tuple[str, str]:
    """Table and picture of how much of the text a continuation recalls at each quarter."""
    recalled: dict[int, dict[int, list[float]]] = {}
    for job in sweep.jobs():
        text = job.text()
        for checkpoint in job.metrics(points=8, tokens=False).checkpoints:
            continuation = checkpoint.continuation
            assert continuation is not None, "the experiment asks for continuations"
            share = n_recalled(text, continuation.prompt, continuation.text) / len(continuation.text)
            of_prefix = recalled.setdefault(job.config.cont_prefix_tokens, {})
            of_prefix.setdefault(checkpoint.percent, []).append(100 * share)
    percents = sorted(next(iter(recalled.values())))
    heads = ["`cont_prefix_tokens`", *(f"{percent} %" for percent in percents)]
    rows = [
        f"| {n} | {' | '.join(spread_cell(shares[percent]) for percent in percents)} |"
        for n, shares in recalled.items()
    ]
    curves = [
        Curve(
            f"{n} tokens given",
            len(shares[percents[0]]),
            percents,
            [statistics.fmean(shares[percent]) for percent in percents],
            [min(shares[percent]) for percent in percents],
            [max(shares[percent]) for percent in percents],
        )
        for n, shares in recalled.items()
    ]
    title = "prefix: percent of the continuation's characters recalled"
    picture = svg.curves(curves, title=title, x_name="percent of the training", is_linear=True).file()
    return "\n".join([f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}", *rows]), picture


def results(client: Client, name: str, sweep: SweepHandle) -> tuple[str, str]:
    """Table and picture of an experiment."""
    shown = SHOWN[name]
    if name == "prefix":
        return prefix_results(sweep)
    found = client.compare(sweep=sweep.id, metrics=list(shown.metrics), perplexity=shown.perplexity)
    if shown.dots:
        return groups_table(found, shown), dots_picture(name, found, shown.dots)
    picture = svg.curves(found.curves, title=f"{name}: train_loss", x_name="step").file()
    return groups_table(found, shown), picture


def with_table(page: str, name: str, table: str) -> str:
    """The page with the table of an experiment in its place."""
    pattern = rf"(<!-- results: {name} -->\n).*?(<!-- /results -->)"
    text, n = re.subn(pattern, lambda place: f"{place[1]}{table}\n{place[2]}", page, count=1, flags=re.DOTALL)
    assert n == 1, f"the page has no place for {name}"
    return text


def newest_sweep(client: Client, name: str, *, run: bool) -> SweepHandle:
    """The newest sweep of that name that has succeeded; with `run` one is run where there is none."""
    cursor = None
    while True:
        page = client.list_sweeps(limit=200, cursor=cursor)
        for one in page.data:
            if one.name == name and one.status == "succeeded":
                return client.get_sweep(one.id)
        cursor = page.next_cursor
        if cursor is None:
            break
    if not run:
        raise SystemExit(f"there is no run of {name}: nanomoe run {name}, or --run")
    (body,) = (one.sweep for one in client.presets() if one.name == name)
    sweep = client.sweep(body.text, body.config, grid=body.grid, points=body.points, seeds=body.seeds, name=name)
    sweep.wait()
    return sweep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run the experiments that have no run yet")
    parser.add_argument("--url", help="address of the service")
    options = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    page = PAGE.read_text("utf-8")
    with Client(options.url) as client:
        for name in SHOWN:
            sweep = newest_sweep(client, name, run=options.run)
            jobs = [*sweep.jobs()]
            table, picture = results(client, name, sweep)
            page = with_table(page, name, table)
            (PICTURES / f"{name}.svg").write_text(picture, "utf-8")
            ends = [job.finished_at for job in jobs if job.finished_at is not None]
            print(f"{name}: {len(jobs)} jobs in {(max(ends) - sweep.created_at).total_seconds():.0f} s")
            print(table)
    PAGE.write_text(page, "utf-8")


if __name__ == "__main__":
    main()
