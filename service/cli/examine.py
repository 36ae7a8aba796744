"""Commands that look into a checkpoint: `score`, `inspect`, `experts` and `explain`."""

import codecs
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from nanomoe.checkpoint import CONFIG, WEIGHTS
from nanomoe.config import JobConfig
from nanomoe.evaluation.explain import Explanation, LayerExplanation
from service.cli import inspection_text, text
from service.cli.jobs import read_text
from service.cli.options import A_JOB, Url, connect
from service.cli.output import Json, print_json
from service.cli.references import Reference
from service.cli.usage_error import UsageError
from service.http import schemas

if TYPE_CHECKING:
    from service.generation.messages import Inspected

Target = Annotated[
    str,
    typer.Argument(
        metavar="JOB[@CHECKPOINT]",
        help=f"{A_JOB}; and optionally a checkpoint, such as @50.",
    ),
]

_LOSS_STYLES = ((1.0, text.GOOD), (3.0, "yellow"))
"""Most nats of a token that is shown in each colour; a token with a higher loss is shown in the colour of errors."""


def score(
    target: Target,
    file: Annotated[str, typer.Argument(metavar="FILE", help="The text to score in UTF-8; - is standard input.")],
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Compute the loss of any text under a checkpoint, and what of it was memorised."""
    reference = Reference.parse(target)
    given = read_text(file)
    with connect(url) as client, text.waiting(f"loading {reference}", quiet=as_json):
        answer = reference.find(client).score(given, reference.checkpoint or "latest")
    if as_json:
        print_json(answer)
        return
    console = text.console()
    console.print(_coloured(given.encode(), answer.tokens))
    console.print(
        f"{answer.n_tokens:,} tokens, loss {text.number(answer.loss, 4)}, total {text.number(answer.total_loss, 2)}, "
        f"perplexity {text.figure(answer.perplexity)}, {text.number(answer.bits_per_byte, 3)} bits/byte"
    )
    if answer.copied is None:
        console.print("no part of it occurs in the training text")
    else:
        copied = answer.copied
        where = f"from byte {copied.start:,}, there from {copied.training_start:,}"
        console.print(f"longest span copied from the training text: {copied.n_bytes:,} bytes, {where}")
        console.print(text.labelled("copied", Text(text.visible(copied.text)), console, 3))


def inspect(
    target: Target,
    prompt: Annotated[str, typer.Argument(help="The text that the model reads.")],
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Show next tokens, attention and routing of a checkpoint at a prompt. --json has every number."""
    reference = Reference.parse(target)
    with connect(url) as client, text.waiting(f"loading {reference}", quiet=as_json):
        answer = reference.find(client).inspect(prompt, reference.checkpoint or "latest")
    if as_json:
        print_json(answer)
        return
    text.print_table(inspection_text.next_tokens_table(answer.tokens[-1].text, answer.likeliest))
    text.print_table(inspection_text.attention_table(answer))
    if answer.routing:
        text.print_table(inspection_text.router_table(answer))


def experts(target: Target, url: Url = None, as_json: Json = False) -> None:
    """Show the experts of a checkpoint: load, importance, loss without each, its top tokens."""
    reference = Reference.parse(target)
    with connect(url) as client:
        job = reference.find(client)
        _check_is_mixture(str(reference), job.view.config)
        percent = job.checkpoint(reference.checkpoint or "latest").percent
        measured = {one.percent: one for one in job.metrics(points=_FEW_POINTS, tokens=False).checkpoints}[percent]
    if measured.moe is None:
        raise UsageError(f"{job.id}@{percent} has no figures of its experts")
    if as_json:
        print_json(measured.moe)
        return
    config, console = job.view.config, text.console()
    console.print(
        f"{job.id}@{percent}  loss {text.number(measured.loss, 4)}, k = {config.k} of {config.n_experts} experts: "
        f"an equal load is {1 / config.n_experts:.4f}",
        soft_wrap=True,
    )
    for layer in measured.moe.layers:
        console.print()
        text.print_table(inspection_text.experts_table(layer, console.width if console.is_terminal else 10_000))


_FEW_POINTS = 8
"""Points of a step series that is not looked at: few enough to cost nothing."""


def explain(
    source: Annotated[str, typer.Argument(metavar="JOB[@PERCENT]", help="The checkpoint, or a folder that holds one.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="A text, whose last token's routing is explained.")],
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Show how a mixture of experts routes one token: logits, probabilities, choice, gates, sum."""
    answer: schemas.InspectResponse | Inspected
    if Path(source).is_dir():
        with text.waiting(f"loading torch and {source}", quiet=as_json):
            config, answer = _inspect_folder(Path(source), prompt)
    else:
        reference = Reference.parse(source)
        with connect(url) as client, text.waiting(f"loading {reference}", quiet=as_json):
            job = reference.find(client)
            config = job.view.config
            _check_is_mixture(source, config)
            answer = job.inspect(prompt, reference.checkpoint or "latest", attention=False)
    explanation = _of_last_token(answer)
    if as_json:
        print_json(explanation)
        return
    console = text.console()
    console.print(
        f"reads {explanation.token!r} (id {explanation.token_id}, position {explanation.position}), routes it, and "
        f"predicts {explanation.predicted!r} to follow\n"
        f"k = {config.k} of {config.n_experts} experts, router_score {config.router_score}"
    )
    for layer in explanation.layers:
        console.print()
        text.print_table(inspection_text.routing_table(layer))
        console.print(inspection_text.gates_line(layer, config))


def _inspect_folder(folder: Path, prompt: str) -> "tuple[JobConfig, Inspected]":
    """The answer of `POST /inspect`, without attention, from a checkpoint in a local folder; raises UsageError."""
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise UsageError(f"{folder} holds no checkpoint: {name} is missing")
    from torch import device

    from service.generation.examiner import LoadedModel, answer_inspect
    from service.generation.messages import Inspect, Refused

    opened = LoadedModel.load(folder, None, device("cpu"))
    _check_is_mixture(str(folder), opened.config)
    question = Inspect(id=0, folder=str(folder), manifest_sha256="", prompt=prompt, attention=False)
    try:
        answer = answer_inspect(question, opened.tokenizer, opened.model)
    except ValueError as error:
        raise UsageError(f"{folder} cannot be explained: {error}") from None
    if isinstance(answer, Refused):
        raise UsageError(f"{folder} cannot be explained: {answer.message}")
    return opened.config, answer


def _check_is_mixture(source: str, config: JobConfig) -> None:
    if not config.use_moe:
        raise UsageError(f"{source} is dense, it has no experts: train one with --set use_moe=true")


def _of_last_token(answer: "schemas.InspectResponse | Inspected") -> Explanation:
    """The routing of the last token that was read."""
    last = answer.tokens[-1]
    return Explanation(
        token=last.text,
        token_id=last.token,
        position=len(answer.tokens) - 1,
        predicted=answer.likeliest[0].text,
        layers=[
            LayerExplanation.of_token(
                layer.layer,
                logits=layer.logits[-1],
                probabilities=layer.probabilities[-1],
                chosen=layer.chosen[-1],
                gates=layer.gates[-1],
                balance_bias=layer.balance_bias,
                shared_experts=layer.n_shared_experts,
            )
            for layer in answer.routing
        ],
    )


def _coloured(given: bytes, tokens: Sequence[schemas.ScoredToken]) -> Text:
    """The text, each token in the colour of its loss; a character that tokens split has the colour of its last part."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    shown = Text()
    for token, following in pairwise([*tokens, None]):
        assert token is not None
        part = given[token.byte_offset : None if following is None else following.byte_offset]
        shown.append(text.visible_lines(decoder.decode(part)), _colour(token.loss))
    return shown


def _colour(loss: float | None) -> str:
    """The style of a token with this loss."""
    if loss is None:
        return text.DIM
    return next((colour for most, colour in _LOSS_STYLES if loss <= most), text.WRONG)
