"""`nanomoe bench train`: training steps beside other implementations and their limit, evaluation's share, growth,
cohorts."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli import text
from service.cli.bench import training_tables
from service.cli.bench.devices import device_named
from service.cli.bench.lists import names, numbers
from service.cli.output import Json, print_json

if TYPE_CHECKING:
    from nanomoe.bench.training.cohort import CohortFigures
    from nanomoe.bench.training.evaluation import EvaluationShare
    from nanomoe.bench.training.growth import Point
    from nanomoe.bench.training.steps import StepFigures

_MEASUREMENTS = ("steps", "evaluation", "growth", "cohort")

_MEMBERS = {"cpu": (2, 4, 16), "cuda": (8, 32, 64, 128)}
"""Jobs that are trained together, by the kind of device."""


def train(
    only: Annotated[
        str, typer.Option(metavar="NAME,...", help="Measurements to make: steps, evaluation, growth, cohort.")
    ] = "steps,evaluation",
    shapes: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Steps to measure: reference, reference-50k, small, gpt2; by default all that suit the device.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Device to measure: cpu, cuda or cuda:N.")] = "cpu",
    turns: Annotated[int, typer.Option(min=1, help="Repetitions of each measurement; medians are shown.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of one repetition.")] = 10,
    dropout: Annotated[
        float | None,
        typer.Option(min=0, max=0.99, help="Dropout of all shapes, in place of their own; 0 makes losses equal."),
    ] = None,
    mixture: Annotated[bool, typer.Option(help="Also measure each shape's twin with a mixture of experts.")] = True,
    transformers: Annotated[bool, typer.Option(help="Also measure transformers' GPT-2.")] = True,
    nanogpt: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A checkout of nanoGPT to measure too, eager and compiled."),
    ] = None,
    texts: Annotated[
        str, typer.Option(metavar="N,...", help="Lengths in bytes of the texts for which evaluation is timed.")
    ] = "10000,100000,1000000",
    job_steps: Annotated[
        int, typer.Option(min=4, help="Optimizer steps of the jobs in which evaluation is timed.")
    ] = 400,
    as_json: Json = False,
) -> None:
    """Seconds of a training step beside transformers, nanoGPT and the machine's limit; evaluation's share of a job."""
    from nanomoe.bench import machine
    from nanomoe.bench.training import cohort, evaluation, growth
    from nanomoe.bench.training import steps as training_steps
    from nanomoe.bench.training.shapes import SHAPES

    wanted = names("--only", only, _MEASUREMENTS)
    on = device_named(device)
    suitable = tuple(name for name, shape in SHAPES.items() if on.type == "cuda" or not shape.needs_gpu)
    chosen = suitable if shapes is None else names("--shapes", shapes, tuple(SHAPES))
    lengths = numbers("--texts", texts, largest=100_000_000)
    not_measured = [f"{name}: on a CPU its step takes too long" for name in SHAPES if name not in (*suitable, *chosen)]
    if nanogpt is None:
        not_measured.append("nanoGPT: no --nanogpt FOLDER was given")
    if not transformers:
        not_measured.append("transformers: switched off")
    figures: list[StepFigures] = []
    shares: list[EvaluationShare] = []
    points: list[Point] = []
    together: list[CohortFigures] = []
    with text.console(stderr=True).status("measuring") as status:
        for name in chosen if "steps" in wanted else ():
            shape = SHAPES[name] if dropout is None else SHAPES[name].with_dropout(dropout)
            figures += training_steps.measure(
                shape,
                on,
                turns=turns,
                steps=steps,
                with_mixture=mixture,
                with_transformers=transformers,
                nanogpt=nanogpt,
                said=status.update,
            )
        for length in lengths if "evaluation" in wanted else ():
            shares.append(evaluation.measure(length, job_steps, on, turns=min(turns, 3), said=status.update))
        if "growth" in wanted:
            points = growth.measure(on, turns=turns, steps=max(1, steps // 5), said=status.update)
        if "cohort" in wanted:
            of_each = [(each, n) for each in cohort.shapes(with_mixture=mixture) for n in _MEMBERS[on.type]]
            together = [
                cohort.measure(each, n, on, turns=turns, steps=steps, said=status.update) for each, n in of_each
            ]
    if "steps" in wanted:
        not_measured += [f"{one.shape}, {who}: {why}" for one in figures for who, why in one.not_measured.items()]
    else:
        not_measured = []
    if as_json:
        print_json(
            {
                "machine": machine.name(on),
                "steps": [asdict(one) for one in figures],
                "evaluation": [asdict(one) for one in shares],
                "growth": [asdict(one) for one in points],
                "cohort": [asdict(one) for one in together],
                "not_measured": not_measured,
            }
        )
        return
    shown = []
    if figures:
        shown += [training_tables.steps_table(figures), training_tables.limits_table(figures)]
    if shares:
        shown.append(training_tables.evaluation_table(shares))
    if points:
        shown.append(training_tables.growth_table(points))
    if together:
        shown.append(training_tables.cohort_table(together))
    for table in shown:
        text.print_table(table)
        text.console().print()
    for line in [machine.name(on), *(f"not measured: {why}" for why in not_measured)]:
        text.console().print(line, style=text.DIM)
