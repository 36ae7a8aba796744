"""Weights that other programs trained, as a checkpoint of ours: nanoGPT's `ckpt.pt` and a Hugging Face GPT-2 folder.

The opposite of `nanomoe.export`. What this model would not compute as the other program does is refused, and named.
A `ckpt.pt` is a pickle: it is read by torch's restricted unpickler, which builds tensors and plain values and runs no
code. `python -m nanomoe.importing` does it in a process of its own, for whoever must not load torch: an `ImportRequest`
on standard input, an `Imported` or a `Refused` on standard output, one JSON line each.
"""

import json
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor

from nanomoe import checkpoint
from nanomoe.config import ConfigWarning, JobConfig, ModelConfig
from nanomoe.data import Windows
from nanomoe.errors import NanomoeError
from nanomoe.evaluation.evaluate import evaluate
from nanomoe.evaluation.evaluated_text import EvaluatedText
from nanomoe.evaluation.metrics import Position
from nanomoe.import_messages import Imported, ImportRequest, Refused
from nanomoe.model.gpt import GPT
from nanomoe.model.size import Sizes
from nanomoe.plan import Plan, TextTooShort
from nanomoe.processes import die_with_parent
from nanomoe.store.opening import open_store
from nanomoe.store.store import StoreError
from nanomoe.tokenizer import TOKENIZER_FILES, Tokenizer, TokenizerError, load_tokenizer

PADDED_TO = 128
"""A vocabulary may have been padded to a multiple of this: nanoGPT pads GPT-2's 50,257 entries to 50,304."""

_WRAPPER = "_orig_mod."
"""What `torch.compile` puts before the name of every parameter."""

_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""GPT-2's Conv1D weights: input first."""

_MASKS = (".attn.bias", ".attn.masked_bias")
"""Causal masks that older versions saved among the weights."""

_GPT2_OPTIONS: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu",),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
"""The values of GPT-2's options that this model computes."""

_GPT2_DEFAULTS: dict[str, Any] = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5} | {
    name: values[0] for name, values in _GPT2_OPTIONS.items() if name not in ("activation_function",)
}
"""What a `config.json` means that does not name an option (transformers' `GPT2Config`)."""


class NotImportable(NanomoeError, ValueError):
    """The files hold no weights that this model can compute with.

    Codes: `not_a_checkpoint`, `pickle_refused`, `tensor_missing`, `tensor_unexpected`, `shape_does_not_fit`,
    `weights_not_finite`, `option_not_supported`, `vocabulary_does_not_fit`, `block_size_too_large`, `model_too_large`.
    """

    code = "not_a_checkpoint"

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class ForeignModel:
    """A model of another program, named as ours is."""

    shape: ModelConfig
    weights: dict[str, Tensor]
    """float32, by nanoGPT's names; the tied output layer is `transformer.wte.weight`."""

    origin: str
    """What it was read from, in words."""


def read_model(folder: Path) -> ForeignModel:
    """The model whose files lie in `folder`: one `.pt` file of nanoGPT, or `config.json` with `model.safetensors`.

    Raises:
        NotImportable: with one of its codes.
    """
    pickles = sorted(path for path in folder.iterdir() if path.suffix == ".pt")
    if (folder / checkpoint.WEIGHTS).is_file() and (folder / checkpoint.CONFIG).is_file() and not pickles:
        return _read_gpt2(folder)
    if len(pickles) == 1:
        return _read_nanogpt(pickles[0])
    there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise NotImportable(
        "not_a_checkpoint",
        f"give nanoGPT's ckpt.pt, or config.json and model.safetensors of a Hugging Face GPT-2; there is {there}",
    )


def _read_nanogpt(path: Path) -> ForeignModel:
    """nanoGPT's `ckpt.pt`: `{"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}`."""
    try:
        # Memory-mapped, so that the optimizer's state, two thirds of the file, is never read.
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        if (
            zipfile.is_zipfile(path)
            or "global" in str(error).partition("WeightsUnpickler error:")[2].partition("\n")[0]
        ):
            reason = "it holds more than tensors and plain values, which would run code of its own"
            raise NotImportable("pickle_refused", f"{path.name} is refused: {reason}") from error
        raise NotImportable("not_a_checkpoint", f"{path.name} is no file of torch.save") from error
    except Exception as error:  # torch raises nearly any exception for a file that it cannot read
        raise NotImportable("not_a_checkpoint", f"{path.name} cannot be read: {error}") from error
    if not isinstance(found, dict) or not {"model", "model_args"} <= found.keys():
        raise NotImportable("not_a_checkpoint", f"{path.name} is not nanoGPT's: it has no model and model_args")
    arguments, state = found["model_args"], found["model"]
    if not isinstance(arguments, dict) or not isinstance(state, dict):
        raise NotImportable("not_a_checkpoint", f"{path.name}: model and model_args must be dictionaries")
    if "bias" not in arguments:
        raise NotImportable(
            "option_not_supported",
            "model_args has no bias: that nanoGPT computed GELU by a tanh, this model computes it exactly",
        )
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias")
    given = {name: arguments.get(name) for name in names} | {"dropout": arguments.get("dropout", 0.0)}
    state = {str(name).removeprefix(_WRAPPER): tensor for name, tensor in state.items()}
    step = found.get("iter_num")
    origin = "nanoGPT's ckpt.pt" + (f" of step {step:,}" if isinstance(step, int) else "")
    return ForeignModel(shape := _shape(given), _tied(state, shape), origin)


def _read_gpt2(folder: Path) -> ForeignModel:
    try:
        config = json.loads((folder / checkpoint.CONFIG).read_bytes())
        state = load_file(folder / checkpoint.WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise NotImportable("not_a_checkpoint", f"the folder cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("model_type") != "gpt2":
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise NotImportable("option_not_supported", f"model_type is {kind!r}; only gpt2 can be imported")
    for name, values in _GPT2_OPTIONS.items():
        if (value := config.get(name, _GPT2_DEFAULTS[name])) not in values:
            raise NotImportable("option_not_supported", f"{name} is {value!r}; this model computes {values[0]!r}")
    inner = config.get("n_inner")
    if inner is not None and inner != 4 * config.get("n_embd", 768):
        raise NotImportable("option_not_supported", f"n_inner is {inner!r}; this model computes 4 * n_embd")
    given = {
        "n_layer": config.get("n_layer", 12),
        "n_head": config.get("n_head", 12),
        "n_embd": config.get("n_embd", 768),
        "block_size": config.get("n_positions", 1024),
        "bias": True,
        "dropout": config.get("resid_pdrop", 0.1),
    }
    # GPT2Model's own names lack the prefix that GPT2LMHeadModel's have.
    state = {n if n.startswith(("transformer.", "lm_head.")) else f"transformer.{n}": t for n, t in state.items()}
    state = {n: t.T if n.endswith(_TRANSPOSED) and t.ndim == 2 else t for n, t in state.items()}
    return ForeignModel(shape := _shape(given), _tied(state, shape), "a Hugging Face GPT-2 folder")


def _shape(given: Mapping[str, Any]) -> ModelConfig:
    try:
        return ModelConfig(**given)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise NotImportable("option_not_supported", f"this model cannot have that shape: {faults}") from error


def _tied(state: Mapping[str, Any], shape: ModelConfig) -> dict[str, Tensor]:
    """The weights that a GPT of this shape has, in float32, every one checked."""
    state = {name: tensor for name, tensor in state.items() if not name.endswith(_MASKS)}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise NotImportable("shape_does_not_fit", f"{name} is no tensor of floating-point numbers")
    wte = state.get("transformer.wte.weight", state.get("lm_head.weight"))
    if wte is None or wte.ndim != 2:
        raise NotImportable("tensor_missing", "transformer.wte.weight is missing")
    head = state.pop("lm_head.weight", wte)
    if not torch.equal(head, wte):
        raise NotImportable(
            "option_not_supported", "lm_head.weight differs from transformer.wte.weight; this model has them tied"
        )
    state["transformer.wte.weight"] = wte
    wanted = {name: tensor.shape for name, tensor in GPT.build(shape, len(wte), "meta").state_dict().items()}
    if missing := sorted(wanted.keys() - state.keys()):
        raise NotImportable("tensor_missing", f"{len(missing)} weights are missing, the first is {missing[0]}")
    if extra := sorted(state.keys() - wanted.keys()):
        raise NotImportable(
            "tensor_unexpected", f"{len(extra)} weights have no place in this model, the first is {extra[0]}"
        )
    for name, expected in wanted.items():
        if state[name].shape != expected:
            raise NotImportable(
                "shape_does_not_fit", f"{name} has the shape {tuple(state[name].shape)}, not {tuple(expected)}"
            )
        if not bool(state[name].isfinite().all()):
            raise NotImportable("weights_not_finite", f"{name} holds NaN or infinity")
    return {name: state[name].float().contiguous() for name in wanted}


def crop(model: ForeignModel, *, vocab_size: int, block_size: int | None) -> tuple[ForeignModel, list[ConfigWarning]]:
    """The model with the rows of a padded vocabulary removed, and its context cropped as nanoGPT's `crop_block_size`
    does; and warnings that say so.

    A row that stands for no text cannot be generated; the logits of the others stay as they are.

    Raises:
        NotImportable: `vocabulary_does_not_fit`, `block_size_too_large`.
    """
    weights, shape, warnings = dict(model.weights), model.shape, []
    n_rows = len(weights["transformer.wte.weight"])
    padded = -(-vocab_size // PADDED_TO) * PADDED_TO
    if not vocab_size <= n_rows <= padded:
        raise NotImportable(
            "vocabulary_does_not_fit",
            f"the model has {n_rows:,} entries, the tokenizer {vocab_size:,}; send the tokenizer's files or name it",
        )
    if n_rows > vocab_size:
        weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:vocab_size].contiguous()
        message = f"the last {n_rows - vocab_size:,} of {n_rows:,} entries stand for no text and were cropped"
        warnings.append(ConfigWarning(code="vocabulary_cropped", message=message))
    if block_size is not None and block_size != shape.block_size:
        if not 1 <= block_size < shape.block_size:
            raise NotImportable(
                "block_size_too_large", f"block_size {block_size} is not within the model's {shape.block_size}"
            )
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:block_size].contiguous()
        shape = shape.model_copy(update={"block_size": block_size})
    return ForeignModel(shape, weights, model.origin), warnings


def import_checkpoint(request: ImportRequest) -> Imported:
    """Read, check, measure on `text`, and write the checkpoint folder, all or nothing.

    Raises:
        NotImportable: with one of its codes.
        TokenizerError, TextTooShort: the tokenizer or the text cannot be used.
        OSError: the disk refuses.
    """
    files = Path(request.files)
    foreign = read_model(files)
    tokenizer = _tokenizer(request, files)
    foreign, warnings = crop(foreign, vocab_size=tokenizer.vocab_size, block_size=request.block_size)
    config = JobConfig(**foreign.shape.model_dump() | {"tokenizer": tokenizer.name})
    tokens = tokenizer.encode(request.text)
    plan = Plan.of(config, len(tokens))
    sizes = Sizes.of(config, tokenizer.vocab_size, len(tokens))
    n_params, n_active_params = sizes.n_params, sizes.n_active_params
    assert n_params is not None
    assert n_active_params is not None
    if request.max_params is not None and n_params > request.max_params:
        raise NotImportable("model_too_large", f"{n_params:,} parameters, of which {request.max_params:,} are allowed")
    model = GPT.build(config, tokenizer.vocab_size)
    model.load_state_dict(foreign.weights)
    evaluation = evaluate(
        model,
        EvaluatedText(Windows(torch.tensor(tokens), config.block_size), plan.eval_max_tokens(config)),
        None,
        tokenizer,
        config,
        position=Position(percent=100, step=0, epoch=0),
        previous_choices={},
        train_loss=None,
        train_dropped={},
    )
    manifest, sha256 = checkpoint.write(
        open_store(request.to),
        {
            checkpoint.WEIGHTS: save_tensors(foreign.weights),
            checkpoint.CONFIG: checkpoint.to_json(config.model_dump(mode="json")),
            checkpoint.METRICS: checkpoint.to_json(evaluation.metrics.to_file()),
            **tokenizer.files(),
        },
    )
    return Imported(
        config=config.model_dump(mode="json"),
        manifest_sha256=sha256,
        files=[entry.model_dump() for entry in manifest.files],
        metrics=evaluation.metrics.to_row(),
        n_tokens=len(tokens),
        n_params=n_params,
        n_active_params=n_active_params,
        origin=foreign.origin,
        warnings=warnings,
    )


def _tokenizer(request: ImportRequest, files: Path) -> Tokenizer:
    """The tokenizer among the files, else the named one."""
    definition = files / TOKENIZER_FILES[0]
    if definition.is_file() or (files / "vocab.json").is_file():
        plain_bytes = load_tokenizer("bytes")
        # What others made must split into words; our own bytes, in a checkpoint that was exported, need not.
        if definition.is_file() and definition.read_bytes() == plain_bytes.definition.encode():
            return plain_bytes
        found = load_tokenizer(files.name, allowed_folders=[files.parent])
        return Tokenizer(request.tokenizer, found.definition)
    folders = [] if request.tokenizer_dir is None else [Path(request.tokenizer_dir)]
    return load_tokenizer(request.tokenizer, text=request.text, allow_hub=request.allow_hub, allowed_folders=folders)


def main() -> None:
    """Answer the request on standard input."""
    request = ImportRequest.model_validate_json(sys.stdin.readline())
    if request.parent is not None:
        die_with_parent(request.parent)
    try:
        answer: Imported | Refused = import_checkpoint(request)
    except (NotImportable, TokenizerError, TextTooShort) as error:
        answer = Refused(code=error.code, message=str(error))
    except StoreError as error:
        answer = Refused(code=error.code, message=str(error))
    except OSError as error:
        if not checkpoint.is_disk_full(error):
            raise
        answer = Refused(code="storage_full", message=str(error))
    print(answer.model_dump_json(), flush=True)


if __name__ == "__main__":
    main()
