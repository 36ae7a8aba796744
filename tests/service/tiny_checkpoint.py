"""A checkpoint of a random model, small enough to be made in every test."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from nanomoe import checkpoint
from nanomoe.config import JobConfig, SamplingConfig
from nanomoe.model.gpt import GPT
from nanomoe.tokenizer import Tokenizer, load_tokenizer
from service.generation.messages import EngineRequest


@dataclass(frozen=True)
class TinyCheckpoint:
    """A recorded checkpoint, and what it holds."""

    folder: Path
    manifest_sha256: str
    config: JobConfig
    weights: dict[str, Tensor]
    tokenizer: Tokenizer

    def request(self, prompt: str = "Era uma vez", max_new_tokens: int = 8, **fields: object) -> EngineRequest:
        """A request to continue a prompt from this checkpoint, greedy unless the `fields` of its sampling say
        otherwise."""
        sampling = {"temperature": 0.0} | {
            name: fields.pop(name) for name in SamplingConfig.model_fields if name in fields
        }
        return EngineRequest.model_validate(
            {
                "folder": str(self.folder),
                "manifest_sha256": self.manifest_sha256,
                "prompt": prompt,
                "max_new_tokens": max_new_tokens,
                "sampling": sampling,
                **fields,
            }
        )


def write_tiny_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    tokenizer: str | Tokenizer = "bytes",
    claimed: dict[str, object] | None = None,
    **knobs: object,
) -> TinyCheckpoint:
    """A checkpoint with random weights, spread so widely that the likeliest token changes with the prompt.

    `claimed`: knobs that its config.json has otherwise than the model.
    """
    loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    config = JobConfig.model_validate(
        {"tokenizer": loaded.name, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 16, **knobs}
    )
    model = GPT(config, loaded.vocab_size)
    model.init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    weights = model.state_dict()
    files = {
        **loaded.files(),
        checkpoint.CONFIG: checkpoint.to_json(config.model_dump(mode="json") | (claimed or {})),
        checkpoint.WEIGHTS: save({name: tensor.contiguous() for name, tensor in weights.items()}),
    }
    _, manifest_sha256 = checkpoint.write(folder, files)
    return TinyCheckpoint(folder, manifest_sha256, config, weights, loaded)


def tiny_files(folder: Path, seed: int = 0) -> dict[str, bytes]:
    """The files of a checkpoint with a random model."""
    write_tiny_checkpoint(folder, seed=seed)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != checkpoint.MANIFEST}
