"""All loops of training at once, so that no job has to wait for the compiler."""

import time

import torch

from nanomoe.config import JobConfig
from nanomoe.tokenizer import load_tokenizer
from nanomoe.training.execution import Execution
from nanomoe.training.run import Run
from nanomoe.training.steps.loops.compiling import LOOPS


def load_all() -> float:
    """Have every loop compiled for this processor, or read from where numba keeps it; returns the seconds it took."""
    began = time.monotonic()
    tokenizer = load_tokenizer("bytes")
    tokens = tokenizer.encode("warm up, then train")
    shape = {"tokenizer": "bytes", "block_size": 4, "n_layer": 2, "n_head": 1, "n_embd": 4, "batch_size": 1}
    # Of two layers the first is dense, the second a mixture.
    mixture = {"use_moe": True, "n_experts": 2, "k": 1, "router_noise": True}
    for precision in ("float32", "bfloat16"):
        config = JobConfig.model_validate(
            shape | mixture | {"precision": precision, "gradient_accumulation_steps": 2, "grad_clip": 1.0}
        )
        execution = Execution.decide(config, "cpu", n_tokens=len(tokens), path="fused")
        run = Run(config, tokens, tokenizer, execution, device=torch.device("cpu"))
        run.train_step()  # two micro-batches
        run.reader.read(run.windows, [0])
        single = config.model_copy(update={"gradient_accumulation_steps": 1})
        Run(single, tokens, tokenizer, execution, device=torch.device("cpu")).train_step()
    LOOPS.mark_compiled()
    return time.monotonic() - began
