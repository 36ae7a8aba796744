"""The step times in mixture_of_experts.md of a mixture against the dense model of equal active parameters, measured.

`.venv/bin/python docs/step_time.py` prints, for the reference job and for a batch of 12 windows, the median time of a
whole training step (forward, backward, gradient norm, AdamW), tokens per second and the peak memory of the process.
Each variant runs in a process of its own; they take turns, so that a machine whose speed drifts treats all alike, and a
ratio is the median of the ratios of neighbouring turns.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "1 x 87, V = 8,192": {"tokenizer": "ptbr-8k"},
    "12 x 64, V = 256": {"tokenizer": "bytes", "block_size": 64},
}
MIXTURE: dict[str, Any] = {"use_moe": True, "n_experts": 8, "k": 2, "expert_hidden_ratio": 2.0}
VARIANTS: dict[str, dict[str, Any]] = {"dense": {}, "mixture": MIXTURE, "mixture, loop over experts": MIXTURE}


def measure(size: str, variant: str, turns: int, steps: int) -> None:
    """Be one variant: at every line on stdin do `steps` steps and say how many seconds one took."""
    import nanomoe
    from nanomoe.config import JobConfig

    config = JobConfig.model_validate(SIZES[size] | VARIANTS[variant])
    import torch

    from nanomoe.model.moe import Assignments, ExpertPath, Experts
    from nanomoe.tokenizer import load_tokenizer
    from nanomoe.training.execution import Execution
    from nanomoe.training.run import Run

    def loop(self: Experts, x_TC: torch.Tensor, assignments: Assignments, _: ExpertPath) -> torch.Tensor:
        """What most published code does: one expert after another, on the tokens that chose it."""
        out_TKC = x_TC.new_zeros(*assignments.chosen_TK.shape, x_TC.shape[1])
        for expert in range(len(self.w_in)):
            token, choice = (assignments.chosen_TK == expert).nonzero(as_tuple=True)
            hidden = x_TC[token] @ self.w_in[expert]
            hidden = hidden if self.b_in is None else hidden + self.b_in[expert]
            out = torch.nn.functional.gelu(hidden) @ self.w_out[expert]
            out_TKC = out_TKC.index_put((token, choice), out if self.b_out is None else out + self.b_out[expert])
        return out_TKC

    if "loop" in variant:
        Experts.forward = loop  # type: ignore[method-assign]
    tokenizer = load_tokenizer(config.tokenizer)
    text = (Path(nanomoe.__file__).parent / "assets" / "paragraph.pt.txt").read_text(encoding="utf-8")
    tokens = tokenizer.encode(text if "1 x" in size else text * 3)
    if "12 x" in size:
        tokens = tokens[: 12 * 64 + 1]
    run = Run(
        config,
        tokens,
        tokenizer,
        Execution.decide(config, "cpu", n_tokens=len(tokens), path="eager"),  # the mixture has no other
        device=torch.device("cpu"),
    )
    for _ in range(5):
        run.train_step()
    for _ in range(turns):
        sys.stdin.readline()
        began = time.perf_counter()
        for _ in range(steps):
            run.train_step()
        seconds = (time.perf_counter() - began) / steps
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        line = {"seconds": seconds, "memory": memory, "targets": run.windows.n_targets(run.order.step(0).windows)}
        print(json.dumps(line), flush=True)


def compare(size: str, turns: int, steps: int) -> None:
    """Print the rows of one size."""
    command = [sys.executable, __file__, "--turns", str(turns), "--steps", str(steps), "--size", size, "--variant"]
    children = {
        variant: subprocess.Popen([*command, variant], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
        for variant in VARIANTS
    }
    seen: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for _ in range(turns):
        for variant, child in children.items():
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write("\n")
            child.stdin.flush()
            seen[variant].append(json.loads(child.stdout.readline()))
    for child in children.values():
        child.communicate()
    for variant, lines in seen.items():
        seconds = statistics.median(line["seconds"] for line in lines)
        ratio = statistics.median(
            mine["seconds"] / dense["seconds"] for mine, dense in zip(lines, seen["dense"], strict=True)
        )
        memory = lines[-1]["memory"] / 2**20
        speed = lines[-1]["targets"] / seconds
        print(f"| {size} | {variant} | {1e3 * seconds:.1f} | {ratio:.2f} | {speed:,.0f} | {memory:,.0f} |", flush=True)


def main() -> None:
    """Measure all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--size")
    parser.add_argument("--variant")
    options = parser.parse_args()
    if options.variant is not None:
        measure(options.size, options.variant, options.turns, options.steps)
        return
    print("| step | model | ms | against dense | targets/s | peak MiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for size in SIZES:
        compare(size, options.turns, options.steps)


if __name__ == "__main__":
    main()
