"""The comparison in mixture_of_experts.md of a dense model with mixtures of equal active parameters, run anew.

`.venv/bin/python docs/dense_vs_mixture.py` trains every variant with three seeds on the bundled paragraph, prints the
table in Markdown, and writes every quarter's figures to `dense_vs_mixture.json` in the folder given with `--out`.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import nanomoe
from nanomoe.config import JobConfig
from nanomoe.tokenizer import load_tokenizer
from nanomoe.training.loop import train
from nanomoe.training.run import Recorded, prepare

MIXTURE: dict[str, Any] = {"use_moe": True, "n_experts": 8, "k": 2, "expert_hidden_ratio": 2.0}
NO_BALANCE: dict[str, Any] = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "mixture": MIXTURE,
    "mixture, no balance": MIXTURE | NO_BALANCE,
    "mixture, balance bias": MIXTURE | NO_BALANCE | {"router_bias_update_rate": 1e-3},
}
LEARNING_RATES = (1e-4, 5e-3)
SEEDS = (1, 2, 3)
BALANCE = ("load_cv", "max_violation", "churn", "router_entropy", "dead_experts")


def quarters(config: JobConfig, text: str) -> list[dict[str, Any]]:
    """The figures of each checkpoint of one run; those of the router as the mean over layers."""
    run = prepare(config, text, load_tokenizer(config.tokenizer)).run
    rows = []
    for happened in train(run):
        if isinstance(happened, Recorded):
            metrics = happened.metrics
            row = {"percent": happened.percent, "loss": metrics.loss, "perplexity": metrics.perplexity}
            if metrics.moe is not None:
                row |= {name: getattr(metrics.moe.mean, name) for name in BALANCE}
            rows.append(row)
    return rows


def main() -> None:
    """Train all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--epochs", type=int, default=500)
    options = parser.parse_args()
    text = (Path(nanomoe.__file__).parent / "assets" / "paragraph.pt.txt").read_text(encoding="utf-8")
    runs: list[dict[str, Any]] = []
    print("| lr | model | final loss | perplexity | load_cv at 0, 25, 50, 75, 100 % | max_violation | churn |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for lr in LEARNING_RATES:
        for name, changes in VARIANTS.items():
            mine = []
            for seed in SEEDS:
                config = JobConfig.model_validate({"lr": lr, "seed": seed, "epochs": options.epochs} | changes)
                mine.append(quarters(config, text))
                runs.append({"lr": lr, "model": name, "seed": seed, "quarters": mine[-1]})
                (options.out / "dense_vs_mixture.json").write_text(json.dumps(runs, indent=1))
            print(f"| {lr:g} | {name} | {' | '.join(_summary(mine))} |", flush=True)


def _summary(runs: list[list[dict[str, Any]]]) -> list[str]:
    """Medians over seeds; of the final loss also the smallest and the largest."""
    losses = [run[-1]["loss"] for run in runs]
    loss = f"{statistics.median(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"
    perplexity = f"{statistics.median(run[-1]['perplexity'] for run in runs):.3f}"
    if "load_cv" not in runs[0][-1]:
        return [loss, perplexity, "", "", ""]

    def by_quarter(name: str) -> str:
        quarters = [[row[name] for row in at_quarter] for at_quarter in zip(*runs, strict=True)]
        return ", ".join("–" if None in figures else f"{statistics.median(figures):.2f}" for figures in quarters)

    return [loss, perplexity, *map(by_quarter, ("load_cv", "max_violation", "churn"))]


if __name__ == "__main__":
    main()
