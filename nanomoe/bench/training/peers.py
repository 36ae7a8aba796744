"""How others do the same training steps: the same initial weights, windows, order of windows and settings of AdamW.

Dropout masks are each one's own, so with dropout the losses agree roughly, without it closely. AdamW is torch's, fused.
On a CPU peers compute in float32, on a GPU in bfloat16 by autocast; they get all threads.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanomoe.bench.training.contender import Contender, NotMeasured, cross_entropy, text_loss
from nanomoe.bench.training.shapes import Shape
from nanomoe.bench.training.ways import precisions, prepare_run
from nanomoe.export import gpt2_model
from nanomoe.training.optim import decays
from nanomoe.training.run import Run


def transformers(shape: Shape, device: torch.device) -> Contender:
    """transformers' `GPT2LMHeadModel`.

    Raises:
        NotMeasured: the shape has a mixture, which no class of transformers computes.
    """
    if shape.config.use_moe:
        raise NotMeasured("no class of transformers computes this mixture of experts")
    run = _start(shape, device)
    model: Any = gpt2_model(run.model.state_dict(), run.config)
    model.to(device)
    return _contender(run, model, lambda inputs_BT: model(input_ids=inputs_BT, use_cache=False).logits)


def nanogpt(shape: Shape, device: torch.device, checkout: Path, *, compiled: bool) -> Contender:
    """nanoGPT's `GPT`, from the `model.py` of a checkout; `compiled`: through `torch.compile`, as its `train.py` does.

    Raises:
        NotMeasured: the shape has a mixture, or the folder holds no nanoGPT.
    """
    if shape.config.use_moe:
        raise NotMeasured("nanoGPT has no mixture of experts")
    theirs = _nanogpt_module(checkout)
    run = _start(shape, device)
    names = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    settings = {name: getattr(run.config, name) for name in names}
    with redirect_stdout(StringIO()):  # it prints its number of parameters
        model = theirs.GPT(theirs.GPTConfig(vocab_size=shape.vocab_size, **settings))
    weights = run.model.state_dict()
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    masks = {name: value for name, value in model.state_dict().items() if name.endswith(".attn.bias")}
    model.load_state_dict(weights | masks)
    model.to(device)
    forward = torch.compile(model) if compiled else model
    # Given targets it computes logits of all positions, and a loss that is not needed: they are the same targets.
    return _contender(run, model, lambda inputs_BT: model(inputs_BT, inputs_BT)[0], lambda *batch: forward(*batch)[1])


def _nanogpt_module(checkout: Path) -> Any:
    source = checkout / "model.py"
    if not source.is_file():
        raise NotMeasured(f"{checkout} holds no model.py of nanoGPT")
    name = "nanogpt_model"
    if name not in sys.modules or Path(str(sys.modules[name].__file__)) != source:
        spec = importlib.util.spec_from_file_location(name, source)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # torch.compile looks its code's module up
        spec.loader.exec_module(module)
    return sys.modules[name]


def _start(shape: Shape, device: torch.device) -> Run:
    """A run at its start: its weights, windows and order are what the peers begin with."""
    run, _ = prepare_run(shape, "eager", precisions(device, "eager")[0], device)
    return run


def _contender(
    run: Run,
    model: nn.Module,
    logits_of: Callable[[Tensor], Tensor],
    loss_of: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Contender:
    config, windows, order = run.config, run.windows, run.order
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for name, p in named.items() if decays(name, p)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named.items() if not decays(name, p)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    precision = precisions(run.device, "eager")[0]
    autocast = torch.autocast(run.device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
    n_steps = 0

    def step() -> None:
        nonlocal n_steps
        inputs_BT, targets_BT = windows.batch(order.step(n_steps).windows)
        model.train()
        with autocast:
            if loss_of is None:
                loss = cross_entropy(logits_of(inputs_BT), targets_BT)
            else:
                loss = loss_of(inputs_BT, targets_BT)
        torch.autograd.backward(loss)
        if config.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        n_steps += 1

    def loss() -> float:
        model.eval()
        return text_loss(logits_of, windows, config.batch_size)

    return Contender(step, loss, model, precision, torch.get_num_threads())


def contenders(
    shape: Shape, device: torch.device, *, with_transformers: bool, nanogpt_checkout: Path | None
) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """All peers by name; building one raises `NotMeasured` where it cannot be done."""
    if with_transformers:
        yield "transformers", lambda: transformers(shape, device)
    if nanogpt_checkout is not None:
        yield "nanoGPT", lambda: nanogpt(shape, device, nanogpt_checkout, compiled=False)
        yield "nanoGPT compiled", lambda: nanogpt(shape, device, nanogpt_checkout, compiled=True)
