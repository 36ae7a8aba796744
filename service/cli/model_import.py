"""The command `import`: it sends the files to the service, which reads them."""

from pathlib import Path
from typing import Annotated

import typer

from service.cli import text
from service.cli.jobs import introduce, read_text
from service.cli.options import Url, connect
from service.cli.output import Json, print_json
from service.cli.usage_error import UsageError


def import_model(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="ckpt.pt, or a folder; and files of the tokenizer, if any.")
    ],
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Name of the tokenizer; gpt2 where none is given.")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option("--block-size", help="Tokens to crop the context to; by default the model's own.")
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option("--text", metavar="FILE", help="Text to measure the figures on; by default the paragraph."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the job.")] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Bring in weights of another program: nanoGPT's ckpt.pt, or the folder of a Hugging Face GPT-2."""
    given = None if measure is None else read_text(measure)
    with connect(url) as client, text.waiting(f"importing {paths[0]}", quiet=as_json):
        try:
            job = client.import_model(paths, tokenizer=tokenizer, block_size=block_size, text=given, name=name)
        except FileNotFoundError as error:
            raise UsageError(str(error)) from None
    if as_json:
        print_json(job.view)
    else:
        introduce(job.view)
