"""What `python -m nanomoe.importing` is asked, and what it answers. Loads no torch."""

from typing import Any

from nanomoe.config import ConfigWarning, Strict

MODEL_FILES = (
    "ckpt.pt",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
)
"""The files that an import reads: nanoGPT's, or those of a Hugging Face folder; and a tokenizer's."""


class ImportRequest(Strict):
    """What `python -m nanomoe.importing` is asked to do."""

    files: str
    """Folder of the files to read."""

    to: str
    """Folder of the checkpoint to write, which must not exist: its path, or its URL in a bucket."""

    text: str
    """The text that the figures are measured on."""

    tokenizer: str = "gpt2"
    """Name of the tokenizer; where the files hold one, it is that, and this is what it is called."""

    block_size: int | None = None
    """Tokens to crop the context to; null keeps the model's own."""

    allow_hub: bool = False
    tokenizer_dir: str | None = None
    max_params: int | None = None
    parent: int | None = None
    """Process id of the parent, with which this process ends."""


class Imported(Strict):
    """The checkpoint that was written."""

    config: dict[str, Any]
    manifest_sha256: str
    files: list[dict[str, Any]]
    """`{"name", "size", "sha256"}` of each file."""

    metrics: dict[str, Any]
    n_tokens: int
    n_params: int
    n_active_params: int
    origin: str
    warnings: list[ConfigWarning]


class Refused(Strict):
    """Why there is none."""

    code: str
    message: str
