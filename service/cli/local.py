"""The commands that compute in this process, `train` and `export`. They import torch when they run."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nanomoe.checkpoint import CONFIG, WEIGHTS
from service.cli import text
from service.cli.addresses import settings
from service.cli.display import Display, JsonDisplay, TextDisplay
from service.cli.jobs import FAILED, INTERRUPTED, read_text
from service.cli.knobs import config_of
from service.cli.options import ConfigFile, Set, Url, connect
from service.cli.output import Json, print_json
from service.cli.references import Reference
from service.cli.usage_error import UsageError
from service.http import schemas

if TYPE_CHECKING:
    from nanomoe.config import JobConfig
    from nanomoe.training.run import Prepared


class Format(StrEnum):
    """Formats of `nanomoe export`."""

    HF = "hf"


def export(
    source: Annotated[str, typer.Argument(metavar="JOB[@PERCENT]", help="The checkpoint, or a folder that holds one.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write, which must not exist.")],
    to: Annotated[Format, typer.Option("--to", help="Format: hf for transformers.")] = Format.HF,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint in another program's format."""
    if folder.exists():
        raise UsageError(f"{folder} exists already; name a new folder")
    with text.waiting(f"loading {source}", quiet=as_json), _checkpoint_folder(source, url) as checkpoint:
        from nanomoe.checkpoint import open as open_checkpoint
        from nanomoe.export import NotExportable, export_hf

        _disable_progress_bars()
        try:
            export_hf(open_checkpoint(checkpoint, None), folder)
        except NotExportable as error:
            raise UsageError(f"{source} cannot be written as {to}: {error}") from None
    if as_json:
        print_json({"folder": str(folder), "format": to})
    else:
        text.console().print(f"wrote {folder}")


@contextmanager
def _checkpoint_folder(source: str, url: str | None) -> Iterator[Path]:
    """The folder of a checkpoint: `source` itself, or a download that is removed afterwards; raises UsageError."""
    with tempfile.TemporaryDirectory(prefix="nanomoe-") as downloads:
        folder = Path(source)
        if not folder.is_dir():
            folder = Path(downloads)
            reference = Reference.parse(source)
            with connect(url) as client:
                job = reference.find(client)
                job.download_checkpoint(reference.checkpoint or "latest", folder)
        for name in (WEIGHTS, CONFIG):
            if not (folder / name).is_file():
                raise UsageError(f"{source} holds no checkpoint: {name} is missing")
        yield folder


def _disable_progress_bars() -> None:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def train(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The training text in UTF-8; - is standard input.")],
    set_: Set = None,
    config: ConfigFile = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="A new folder for the checkpoints: DIR/0, DIR/25, ...")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train in this process, without a service: the same loop, figures and files."""
    job_config = config_of(config, set_ or [])
    given = read_text(file)
    if job_config.init_from is not None:
        raise UsageError(f"init_from names a job of a service; submit this one to it: {text.program()} submit FILE")
    if out is not None and out.exists():
        raise UsageError(f"{out} exists already; name a new folder")
    with text.waiting("loading torch", quiet=as_json):
        prepared = _prepare(given, job_config)
        run = prepared.run

        from nanomoe.training.loop import LossNotFinite

    try:
        with JsonDisplay() if as_json else TextDisplay(text.console()) as display:
            _train(prepared, display, out)
    except KeyboardInterrupt:
        kept = f"; its checkpoints are in {out}" if out is not None else ""
        text.console(stderr=True).print(f"stopped at step {run.progress.step:,}{kept}")
        raise typer.Exit(INTERRUPTED) from None
    except LossNotFinite as error:
        text.console(stderr=True).print(f"nanomoe: {error.code}: {error}")
        raise typer.Exit(FAILED) from None
    if out is not None and not as_json:
        text.console().print(f"checkpoints are in {out}")


def _prepare(given: str, config: "JobConfig") -> "Prepared":
    """Prepare a run from text and config; raises UsageError where that is impossible."""
    from nanomoe.errors import NanomoeError
    from nanomoe.tokenizer import load_tokenizer
    from nanomoe.training.execution import find_device
    from nanomoe.training.run import prepare

    here = settings()
    try:
        find_device(here.device)  # before a tokenizer is loaded, let alone trained
        folders = [here.tokenizer_dir] if here.tokenizer_dir is not None else []
        tokenizer = load_tokenizer(config.tokenizer, text=given, allow_hub=here.allow_hub, allowed_folders=folders)
        return prepare(config, given, tokenizer, device=here.device)
    except NanomoeError as error:
        raise UsageError(f"{error.code}: {error}") from None


def _train(prepared: "Prepared", display: Display, out: Path | None) -> None:
    """Train, and show the run."""
    from nanomoe import checkpoint
    from nanomoe.training import loop as training

    began = time.monotonic()
    run = prepared.run
    for warning in prepared.warnings:
        display.warning(warning.code, warning.message)
    for happened in training.train(run):
        match happened:
            case training.Steps():
                step = happened.step[-1]
                left = (run.plan.total_steps - step) * (time.monotonic() - began) / step
                display.progress(
                    schemas.Progress(
                        step=step,
                        total_steps=run.plan.total_steps,
                        epoch=happened.epoch,
                        percent=100 * step / run.plan.total_steps,
                        tok_per_sec=happened.tok_per_sec,
                        eta_seconds=left,
                    )
                )
            case training.Recorded():
                if out is not None:
                    checkpoint.write(out / str(happened.percent), happened.files)
                clocked = {"tok_per_sec": happened.tok_per_sec, "created_at": datetime.now(UTC)}
                measured = happened.metrics.model_dump(exclude_unset=True)
                display.quarter(schemas.CheckpointMetrics.model_validate(measured | clocked))
            case training.Warned():
                display.warning(happened.code, happened.message)
