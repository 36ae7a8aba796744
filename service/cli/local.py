"""The commands that compute on this machine, `train` and `export`: they import torch when run."""

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
from service.cli.mistakes import Mistake
from service.cli.options import ConfigFile, Set, Url, connect
from service.cli.output import Json, print_json
from service.cli.references import Reference
from service.http import schemas

if TYPE_CHECKING:
    from nanomoe.config import JobConfig
    from nanomoe.training.run import Run


class Format(StrEnum):
    """What `nanomoe export` writes."""

    HF = "hf"


def export(
    source: Annotated[str, typer.Argument(metavar="JOB[@PERCENT]", help="The checkpoint, or a folder that holds one.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder to write.")],
    to: Annotated[Format, typer.Option("--to", help="hf: what transformers opens.")] = Format.HF,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint in another program's format."""
    if folder.exists():
        raise Mistake(f"{folder} is there already; name a new folder")
    with text.waiting(f"loading {source}", quiet=as_json), _found(source, url) as checkpoint:
        from nanomoe.export import NotExportable, export_hf

        _without_bars_of_others()
        try:
            export_hf(checkpoint, folder)
        except NotExportable as error:
            raise Mistake(f"{source} cannot be written as {to}: {error}") from None
    if as_json:
        print_json({"folder": str(folder), "format": to})
    else:
        text.console().print(f"wrote {folder}")


@contextmanager
def _found(source: str, url: str | None) -> Iterator[Path]:
    """The folder of a checkpoint: `source` itself, or a download that is gone afterwards; raises Mistake."""
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
                raise Mistake(f"{source} holds no checkpoint: {name} is missing")
        yield folder


def _without_bars_of_others() -> None:
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
    """Train here and now, without a service: the same loop, the same figures, the same files."""
    job_config = config_of(config, set_ or [])
    given = read_text(file)
    if job_config.init_from is not None:
        raise Mistake(f"init_from names a job of a service; submit this one to it: {text.program()} submit FILE")
    if out is not None and out.exists():
        raise Mistake(f"{out} is there already; name a new folder")
    with text.waiting("loading torch", quiet=as_json):
        run = _prepare(given, job_config)

        from nanomoe.training.loop import LossNotFinite

    try:
        with JsonDisplay() if as_json else TextDisplay(text.console()) as display:
            _train(run, len(given.encode()), display, out)
    except KeyboardInterrupt:
        kept = f"; its checkpoints are in {out}" if out is not None else ""
        text.console(stderr=True).print(f"stopped at step {run.progress.step:,}{kept}")
        raise typer.Exit(INTERRUPTED) from None
    except LossNotFinite as error:
        text.console(stderr=True).print(f"nanomoe: {error.code}: {error}")
        raise typer.Exit(FAILED) from None
    if out is not None and not as_json:
        text.console().print(f"checkpoints are in {out}")


def _prepare(given: str, config: "JobConfig") -> "Run":
    """Text and config to a model that can train; raises Mistake for what cannot be."""
    from nanomoe.plan import TextTooShort
    from nanomoe.tokenizer import TokenizerError, load_tokenizer
    from nanomoe.training.execution import DeviceUnavailable, Execution, find_device
    from nanomoe.training.run import Run

    here = settings()
    try:
        device = find_device(here.device)
        folders = [here.tokenizer_dir] if here.tokenizer_dir is not None else []
        tokenizer = load_tokenizer(config.tokenizer, text=given, allow_hub=here.allow_hub, allowed_folders=folders)
        tokens = tokenizer.encode(given)
        execution = Execution.decide(config, here.device, n_tokens=len(tokens), vocab_size=tokenizer.vocab_size)
        execution.apply()
        return Run(config, tokens, tokenizer, execution, device=device)
    except (DeviceUnavailable, TokenizerError, TextTooShort) as error:
        raise Mistake(f"{error.code}: {error}") from None


def _train(run: "Run", n_bytes: int, display: Display, out: Path | None) -> None:
    """`n_bytes`: of the text, in UTF-8."""
    from nanomoe import checkpoint
    from nanomoe.config_warnings import config_warnings
    from nanomoe.training import loop as training

    began = time.monotonic()
    vocab_size = run.tokenizer.vocab_size
    for warning in config_warnings(run.config, run.plan, n_bytes=n_bytes, vocab_size=vocab_size):
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
                figures = {
                    "percent": happened.percent,
                    "step": happened.step,
                    "epoch": happened.epoch,
                    "tok_per_sec": happened.tok_per_sec,
                    "created_at": datetime.now(UTC),
                }
                display.quarter(schemas.CheckpointMetrics.model_validate(happened.metrics | figures))
            case training.Warned():
                display.warning(happened.code, happened.message)
