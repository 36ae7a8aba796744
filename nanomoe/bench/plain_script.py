"""The reference run as a plain script: what a job is measured beside.

`python -m nanomoe.bench.plain_script` trains transformers' GPT-2 on the bundled paragraph, in float32 with torch's
fused AdamW, evaluates the text and saves the weights at every quarter, and prints the last loss as JSON. It begins with
the reference job's initial weights and does as many steps.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_model

from nanomoe.bench.training import peers
from nanomoe.bench.training.shapes import SHAPES
from nanomoe.plan import Plan


def train(steps: int | None) -> float:
    """Train the reference run, or only `steps` of it; the loss of the text at the end, nats per token."""
    shape = SHAPES["reference"]
    config = shape.config.model_copy(update={"max_steps": steps})
    contender = peers.transformers(shape, torch.device("cpu"))
    plan = Plan.of(config, shape.n_tokens)
    loss = contender.loss()
    with tempfile.TemporaryDirectory(prefix="nanomoe-bench-") as folder:
        for step in range(plan.total_steps + 1):
            if step in plan.quarters:
                loss = contender.loss()
                save_model(contender.model, str(Path(folder) / f"{plan.quarters[step]}.safetensors"))
            if step < plan.total_steps:
                contender.step()
    return loss


def main() -> None:
    """Train, and print the loss."""
    parser = argparse.ArgumentParser(prog="python -m nanomoe.bench.plain_script")
    parser.add_argument("--steps", type=int)
    json.dump({"loss": train(parser.parse_args().steps)}, sys.stdout)


if __name__ == "__main__":
    main()
