"""The call that imports the weights of another program."""

from collections.abc import Sequence
from pathlib import Path

from nanomoe.import_messages import MODEL_FILES
from service.client.calls.call import Call, parsed
from service.http import schemas

IMPORT_SECONDS = 900
"""Read time-out of an import, longer than the service takes before it gives up."""


def import_model(
    paths: str | Path | Sequence[str | Path],
    *,
    tokenizer: str | None = None,
    block_size: int | None = None,
    text: str | None = None,
    name: str | None = None,
) -> Call[schemas.JobView]:
    """Bring in weights of another program as a finished job: nanoGPT's `ckpt.pt`, or the folder of a Hugging Face
    GPT-2, with the files of its tokenizer beside it or the name of one. Not repeatable: each makes a job."""
    given = {"tokenizer": tokenizer, "block_size": block_size, "text": text, "name": name}
    return Call(
        "POST",
        "/models",
        parsed(schemas.JobView),
        fields={key: str(value) for key, value in given.items() if value is not None},
        files=model_files([paths] if isinstance(paths, str | Path) else paths),
        repeatable=False,
        read_seconds=IMPORT_SECONDS,
    )


def model_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files to send of these files and folders. Raises FileNotFoundError where one is missing or holds none."""
    found: list[Path] = []
    for path in map(Path, paths):
        names = [path / name for name in MODEL_FILES] if path.is_dir() else [path]
        files = [name for name in names if name.is_file()]
        if not files:
            raise FileNotFoundError(f"{path} is no model: no {' or '.join(MODEL_FILES)} is there")
        found += files
    return found
