"""The commands against the real API: what they print, on which stream, and how they exit."""

import json
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.core import TyperGroup
from typer.main import get_command

from service.cli import COMMANDS, addresses, app
from service.cli.commands import LazyCommand, as_command
from service.cli.display import TextDisplay
from service.cli.jobs import read_text
from service.http import schemas
from service.jobs import queue, recording
from tests.api import TEXT, Api
from tests.descriptions import stands_alone
from tests.service.cli.conftest import TINY, Run

ROOT = Path(__file__).parents[3]


def test_submit_prints_the_job_and_how_to_watch_it(at: Run, text_file: str, api: Api) -> None:
    done = at("submit", text_file, *TINY, "--name", "uma rodada", "--tag", "a=b", "--priority", "3")
    assert done.code == 0
    assert done.err == ""
    job = api.http.get("/jobs?limit=1").json()["data"][0]
    first, size, *_, last = done.out.splitlines()
    assert first == f"{job['id']}  queued, next  uma rodada"
    assert size.endswith("65 tokens, 3 steps")
    assert last == f"watch it: nanomoe watch {job['id']} --url {api.url}"
    assert (job["tags"], job["priority"], job["config"]["epochs"]) == ({"a": "b"}, 3, 3)


def test_a_hinted_command_works_in_any_terminal(
    at: Run, text_file: str, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    hints = [at("submit", text_file, *TINY).out.splitlines()[-1], at("watch", api.finished()).out.splitlines()[-2]]
    monkeypatch.delenv("NANOMOE_URL")
    for hint in hints:
        name, *arguments = shlex.split(hint.rpartition(": ")[2])
        assert name == "nanomoe"
        if arguments[0] == "watch":
            at("cancel", *arguments[1:])
            assert at(*arguments).out.splitlines()[-2].startswith("cancelled")
        else:
            arguments[arguments.index("PROMPT")] = ""
            assert at(*arguments).err.startswith("nanomoe: empty_prompt: ")


@pytest.mark.parametrize(
    ("url", "environment", "option", "start"),
    [
        ("http://127.0.0.1:8000", {}, "", "serve"),
        ("http://127.0.0.1:8000", {"NANOMOE_PORT": "9000"}, " --url http://127.0.0.1:8000", "serve --port 8000"),
        ("http://127.0.0.1:9000", {"NANOMOE_PORT": "9000"}, " --url http://127.0.0.1:9000", "serve"),
        ("http://[::1]:8000", {"NANOMOE_HOST": "::"}, " --url 'http://[::1]:8000'", "serve"),
        (
            "http://127.0.0.1:8000",
            {"NANOMOE_URL": "http://a.test"},
            " --url http://127.0.0.1:8000",
            "serve --port 8000",
        ),
        ("http://a.test", {"NANOMOE_URL": "http://a.test"}, " --url http://a.test", None),
    ],
)
def test_the_address_is_named_where_another_terminal_would_not_find_it(
    url: str, environment: dict[str, str], option: str, start: str | None, nanomoe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert addresses.option_for(url) == option
    said = addresses.how_to_reach(url)
    assert said == (" or --url" if start is None else f" or --url; start the service with: nanomoe {start}")


def test_a_text_comes_from_a_pipe_and_a_config_from_a_file(at: Run, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"tokenizer": "bytes", "epochs": 7, "lr": 0.5}')
    done = at("submit", "-", "--config", str(config), "--set", "lr=1e-3", "--json", stdin=TEXT.encode())
    assert done.code == 0
    assert done.json["text"]["n_bytes"] == len(TEXT.encode())
    assert (done.json["config"]["epochs"], done.json["config"]["lr"]) == (7, 0.001)


def test_a_dry_run_prints_the_steps_and_submits_no_job(at: Run, text_file: str, api: Api) -> None:
    before = len(api.http.get("/jobs").json()["data"])
    done = at("submit", text_file, *TINY, "--dry-run", "--set", "cont_prefix_tokens=90")
    assert "100 % at step 3" in done.out
    assert "warning prefix_longer_than_text" in done.out
    assert at("submit", text_file, *TINY, "--dry-run", "--json").json["total_steps"] == 3
    assert len(api.http.get("/jobs").json()["data"]) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["submit", "nowhere.txt"], "cannot read nowhere.txt: No such file or directory"),
        (["submit", "-", "--set", "epohcs=3"], "there is no 'epohcs'; did you mean 'epochs'?"),
        (["submit", "-", "--set", "epochs"], "'epochs' must look like epochs=value"),
        (["submit", "-", "--set", "epochs=0"], "epochs should be greater than or equal to 1"),
        (["submit", "-", "--set", "lr=nan"], "lr should be a finite number"),
        (["submit", "-", "--set", "n_head=3"], "n_embd (128) must be a multiple of n_head (3)"),
        (["submit", "-", "--config", "missing.json"], "cannot read missing.json: No such file or directory"),
        (["submit", "-", "--tag", "a"], "--tag 'a' must look like key=value"),
        (["submit", "-", "--tag", "ç=1"], "must consist of the letters A to Z and a to z, digits, _, . and -"),
        (["submit", "-", "--name", "a\nb"], "body.name: must not hold control characters, such as line ends"),
        (["submit", "-", "--set", 'tokenizer="a\\nb"'], "tokenizer must not hold control characters"),
        (
            ["submit", "-", "--set", "init_from=x\n@50"],
            "init_from.job_id must be an id, a name, or",
        ),
        (["jobs", "--tag", "ç"], "query.tag: must look like key or key=value"),
        (["submit", "-"], "invalid_request: "),
        (["watch", "@50"], "'@50' names no job"),
        (["generate", "latest@33", "x"], "after @ comes 0, 25, 50, 75, 100 or latest"),
        (["generate", "latest", "x", "--set", "prompt=y"], "there is no 'prompt'"),
        (["watch", "0" * 32], "job_not_found: "),
        (["watch", "../../workers"], "no job has the name"),
        (["jobs", "--limit", "0"], "invalid_request: "),
        (["knobs", "zzz"], "there is no 'zzz'"),
        (["jobs", "--url", "nanomoe.test"], "'nanomoe.test' is not an address"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_usage_error_is_one_line_and_exit_code_2(at: Run, arguments: list[str], said: str) -> None:
    done = at(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("nanomoe: ")
    assert said in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_an_empty_prompt_is_one_line_that_says_why(api: Api, at: Run, command: str) -> None:
    done = at(command, api.finished(), "")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("nanomoe: empty_prompt: the prompt is empty")
    assert done.err.count("\n") == 1


def test_an_unknown_option_is_exit_code_2(nanomoe: Run) -> None:
    assert nanomoe("jobs", "--nope").code == 2


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    file = tmp_path / "texto.txt"
    file.write_text("olá", "utf-8-sig")
    assert read_text(str(file)) == "olá"


def test_a_file_that_is_not_utf_8_is_refused_with_the_offset(at: Run) -> None:
    done = at("submit", "-", stdin=b"ol\xe1")
    assert (done.code, done.err) == (2, "nanomoe: - is not UTF-8: byte 2 is 0xe1\n")


def test_an_unreachable_service_is_exit_code_3_with_advice(nanomoe: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        done = nanomoe("jobs", "--url", url)
    assert done.code == 3
    said = f"nanomoe: nothing answers at {url}; another address is set with NANOMOE_URL or --url; "
    assert done.err == f"{said}start the service with: nanomoe serve --port {url.rpartition(':')[2]}\n"


def test_the_address_comes_from_the_settings(
    nanomoe: Run, api: Api, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    port = api.url.rpartition(":")[2]
    (tmp_path / ".env").write_text(f"NANOMOE_PORT={port}\n")
    assert nanomoe("jobs", "--json").code == 0
    monkeypatch.setenv("NANOMOE_PORT", "many")
    done = nanomoe("jobs")
    assert done.code == 2
    assert "NANOMOE_PORT: " in done.err


def test_watching_shows_each_quarter_once_and_how_it_ended(at: Run, api: Api) -> None:
    job_id = api.finished(name="feita")
    done = at("watch", job_id)
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == f"{job_id}  succeeded  feita"
    header = next(n for n, line in enumerate(lines) if line.split()[:2] == ["quarter", "step"])
    rows = [line.split() for line in lines[header + 1 :] if re.match(r" +\d+ %", line)]
    assert rows == [
        ["0", "%", "0", "2.0000", "7.389", "25.0", "%", "2.880", "–"],
        ["100", "%", "500", "2.0000", "7.389", "25.0", "%", "2.880", "–"],
    ]
    assert "  reconstructs aaaaaaaaa" in lines
    assert "     continues abc│def" in lines
    assert sum(line.startswith("          note untrained, ") for line in lines) == 1
    assert lines[-2].startswith("succeeded in ")
    assert lines[-2].endswith(f"; go on with: nanomoe generate {job_id} PROMPT --url {api.url}")
    assert lines[-1] == "what the words mean: nanomoe metrics --explain"
    assert "succeeded" not in lines
    assert max(map(len, lines[:-2])) <= 100


def test_watching_a_job_that_fails_is_exit_code_1(at: Run, api: Api) -> None:
    claim = api.running()
    queue.finish(api.db, claim, "failed", error={"code": "loss_not_finite", "message": "at step 4\x1b[31m"})
    done = at("watch", claim.job_id)
    assert done.code == 1
    assert done.out.splitlines()[-2].endswith(": loss_not_finite: at step 4␛[31m")


@pytest.mark.parametrize("reason", ["stopped early at step 42: perplexity 1.987", None], ids=["recorded", "derived"])
def test_a_job_that_stopped_early_is_shown_with_the_reason(at: Run, api: Api, reason: str | None) -> None:
    job_id = api.stopped_early(reason=reason)
    told = reason or "stopped early at step 42"
    lines = at("watch", job_id).out.splitlines()
    assert lines[0] == f"{job_id}  succeeded ({told})"
    assert lines[-3] == "stopped early at step 42: perplexity 1.987", "below the quarter's row"
    assert f", {told}; go on with: " in lines[-2]
    row = next(line for line in at("jobs").out.splitlines() if line.startswith(job_id))
    assert "100 %" in row
    assert row.endswith(f"  {told}")
    progress = at("jobs", "--limit", "1", "--json").json["data"][0]["progress"]
    assert (progress["step"], progress["percent"], progress["eta_seconds"]) == (42, 100.0, 0.0)


def test_a_job_that_ran_to_its_last_step_gives_no_reason(at: Run, api: Api) -> None:
    assert "(" not in at("watch", api.finished()).out.splitlines()[0]


def test_a_warning_is_shown_once(at: Run, api: Api) -> None:
    job = api.submit(config={"tokenizer": "bytes", "cont_prefix_tokens": 90, "cont_max_new_tokens": 5})
    claim = api.claim(job["id"])
    at_the_start = [*job["warnings"], {"code": "new", "message": "since"}]
    recording.record_prepared(
        api.db,
        claim,
        execution={"device": "cpu"},
        n_tokens=64,
        total_steps=500,
        model={"n_params": 1000, "n_active_params": 1000},
        warnings=at_the_start,
    )
    recording.record_event(api.db, claim, "warning", {"code": "later", "message": "m"})
    queue.finish(api.db, claim, "succeeded", progress={"step": 500})
    lines = at("watch", claim.job_id).out.splitlines()
    codes = [line.split()[1] for line in lines if line.startswith("warning ")]
    assert codes == ["prefix_longer_than_text:", "new:", "later:"]


def test_watching_a_queued_job_shows_its_queue_position(at: Run, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    first = api.running()
    second, third = api.submit()["id"], api.submit()["id"]
    looks = iter(
        [
            lambda: queue.finish(api.db, first, "succeeded", progress={"step": 500}),
            lambda: None,  # nothing has changed: no line
            lambda: queue.request_cancel(api.db, second),
            lambda: queue.request_cancel(api.db, third),
        ]
    )
    waiting = TextDisplay.waiting

    def look(display: TextDisplay, job: schemas.JobView) -> None:
        waiting(display, job)
        next(looks)()

    monkeypatch.setattr(TextDisplay, "waiting", look)
    monkeypatch.setattr("service.cli.display.QUEUE_POLL_SECONDS", 0.0)
    lines = at("watch", third).out.splitlines()
    assert lines[0] == f"{third}  queued, 1 ahead"
    assert [line for line in lines if line.startswith("queued")] == ["queued", "queued, next"]
    assert lines[-2] == "cancelled"


def test_queued_jobs_are_listed_with_their_queue_position(at: Run, api: Api) -> None:
    api.running()
    ids = [api.submit()["id"] for _ in range(2)]
    rows = at("jobs", "--limit", "2").out.splitlines()[1:]
    assert [(row.split()[0], row.rsplit("  ", 1)[1]) for row in rows] == [(ids[1], "1 ahead"), (ids[0], "next")]


def test_watching_for_programs_is_a_line_of_json_for_each_event(at: Run, api: Api) -> None:
    done = at("watch", api.finished(), "--json")
    events = [json.loads(line) for line in done.out.splitlines()]
    assert [event["data"]["percent"] for event in events if event["event"] == "checkpoint"] == [0, 100]
    assert events[-1]["event"] == "job"
    assert events[-1]["data"]["status"] == "succeeded"


def test_metrics_show_the_quarters_and_the_curve(at: Run, api: Api) -> None:
    job_id = api.finished()
    done = at("metrics", job_id)
    assert "train loss 10.000 █" in done.out
    curve, foot = done.out.splitlines()[-2:]
    assert curve.endswith(" 3.333")
    assert foot == "what the words mean: nanomoe metrics --explain"
    assert at("metrics", job_id, "--json").json["checkpoints"][0]["continuation"]["text"] == "def"
    assert at("metrics", job_id, "--csv").out.startswith("step,train_loss,lr,grad_norm\n1,10.0,")


def test_jobs_show_their_last_figures_and_what_differs_from_the_defaults(at: Run, api: Api) -> None:
    parent = api.finished()
    config = {"tokenizer": "bytes", "lr": 0.005, "betas": [0.8, 0.9], "init_from": {"job_id": parent, "checkpoint": 0}}
    job_id = api.finished(name="rápida", config=config)
    row = next(line for line in at("jobs").out.splitlines() if line.startswith(job_id))
    assert row.split()[1:6] == ["succeeded", "100", "%", "2.0000", "7.389"]
    assert row.endswith(f"  rápida  lr=0.005 betas=[0.8, 0.9] init_from={parent}@0 tokenizer=bytes")
    assert at("jobs", "--limit", "1", "--json").json["data"][0]["figures"] == {
        "percent": 100,
        "loss": 2.0,
        "perplexity": 7.389,
    }


def test_the_metrics_of_several_jobs_are_shown_in_turn(at: Run, api: Api) -> None:
    ids = [api.finished() for _ in range(2)]
    lines = at("metrics", *ids).out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("succeeded")] == ids
    assert sum(line.startswith("what the words mean") for line in lines) == 1
    assert [one["job_id"] for one in at("metrics", *ids, "--json").json] == ids
    header, *rows = at("metrics", *ids, "--csv").out.splitlines()
    assert header == "job_id,step,train_loss,lr,grad_norm"
    assert [row.split(",")[:2] for row in rows] == [[job_id, step] for job_id in ids for step in "123"]


def test_the_metrics_of_a_mixture_show_its_figures_quarter_by_quarter(at: Run, api: Api) -> None:
    claim = api.running(config={"tokenizer": "bytes", "use_moe": True})
    figures = {"load_cv": 0.25, "max_violation": 0.5, "dead_experts": 1, "dropped_fraction": 0.0, "churn": 0.125}
    mixture = {"layers": [{"layer": 1, "load": [1.0]} | figures], "mean": figures, "max": figures}
    api.record_checkpoint(claim, 100, 500, moe=mixture)
    queue.finish(api.db, claim, "succeeded", progress={"step": 500})
    rows = [line.split() for line in at("metrics", claim.job_id).out.splitlines()]
    assert ["load_cv", "0.2500"] in rows
    assert ["churn", "0.1250"] in rows
    assert at("metrics", claim.job_id, "--json").json["checkpoints"][-1]["moe"]["max"]["dead_experts"] == 1


def test_the_words_of_a_run_are_explained_without_a_service(nanomoe: Run) -> None:
    done = nanomoe("metrics", "--explain")
    assert (done.code, done.err) == (0, "")
    for word in ("churn", "max_violation", "load_cv", "unigram", "upcycling", "loss"):
        assert word in done.out
    shown = schemas.CheckpointMetrics.model_fields.keys() | schemas.MixtureLayer.model_fields.keys()
    told = {
        word: meaning
        for words in nanomoe("metrics", "--explain", "--json").json.values()
        for word, meaning in words.items()
    }
    assert shown - told.keys() == {"percent", "step", "epoch", "created_at", "layer"}
    assert all(meaning.endswith(".") for meaning in told.values())


def test_a_job_is_stopped_resumed_cancelled_and_deleted(at: Run, text_file: str) -> None:
    job_id = at("submit", text_file, *TINY, "--json").json["id"]
    assert at("pause", job_id).out.startswith(f"{job_id}  paused")
    assert at("resume", "latest").out == f"{job_id}  queued\n"
    busy = at("delete", job_id)
    assert (busy.code, busy.err.split(": ")[1]) == (2, "job_not_finished")
    assert at("cancel", job_id, "--json").json["status"] == "cancelled"
    assert at("delete", job_id, "--json").json == {"deleted": job_id}
    assert at("watch", job_id).code == 2


def test_the_table_of_jobs_is_not_cut_in_a_pipe(at: Run, api: Api) -> None:
    name = "um nome bastante comprido para caber numa coluna só"
    ids = [api.submit(name=name)["id"] for _ in range(2)]
    done = at("jobs", "--limit", "2")
    header, *rows = done.out.splitlines()
    assert header.split() == ["job", "status", "done", "loss", "ppl", "submitted"]
    assert [row.split()[0] for row in rows] == ids[::-1]
    assert [row.partition(" s  ")[2] for row in rows] == [
        f"{name}  tokenizer=bytes  1 ahead",
        f"{name}  tokenizer=bytes  next",
    ]
    assert [job["id"] for job in at("jobs", "--limit", "2", "--json").json["data"]] == ids[::-1]
    assert at("jobs", "--tag", "nobody").out == "no jobs\n"


@pytest.mark.parametrize("separator", ["=", ":"])
def test_a_tag_is_set_and_found_in_one_notation(at: Run, text_file: str, separator: str) -> None:
    tag = f"aula{separator}2=3:4"
    job = at("submit", text_file, *TINY, "--tag", tag, "--json").json
    assert job["tags"] == {"aula": "2=3:4"}
    for given in ("aula", "aula=2=3:4", "aula:2=3:4"):
        assert job["id"] in [found["id"] for found in at("jobs", "--tag", given, "--json").json["data"]]
    assert at("jobs", "--tag", "aula=2").out == "no jobs\n"


def test_workers_are_listed_or_their_absence_is_reported(at: Run, api: Api) -> None:
    assert at("workers", "--json").code == 0
    assert at("workers").out != ""


def test_the_version_and_the_help_need_no_service(nanomoe: Run) -> None:
    assert nanomoe("--version").out == "nanomoe 0.1.0\n"
    assert "submit" in nanomoe("--help").out
    assert "KNOB=VALUE" in nanomoe("submit", "--help").out


def _loaded_by(*arguments: str) -> set[str]:
    """The modules that a command has loaded when it ends."""
    script = (
        "import sys\nfrom service.cli import main\n"
        f"sys.argv = {['nanomoe', *arguments]!r}\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print('LOADED', *sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(ran.stdout.rpartition("LOADED")[2].split())


HEAVY = {"torch", "transformers", "tokenizers", "fastapi", "sqlalchemy", "numpy"}
"""What takes a second or more to load, and what only a service needs."""


def test_the_list_of_commands_loads_none_of_them() -> None:
    loaded = _loaded_by("--help")
    assert loaded & {*HEAVY, "pydantic", "pydantic_settings", "httpx", "asyncio", "nanomoe.config"} == set()
    assert {name for name in loaded if name.startswith("service.")} == {
        "service.cli",
        "service.cli.commands",
        "service.cli.usage_error",
        "service.cli.output",
    }


def test_knobs_are_listed_without_loading_a_client() -> None:
    assert _loaded_by("knobs", "lr") & {*HEAVY, "pydantic_settings", "httpx", "service.http.schemas"} == set()


@pytest.mark.parametrize("arguments", [("jobs",), ("workers",), ("submit", "--dry-run", "LICENSE")], ids=lambda a: a[0])
def test_a_command_for_the_service_loads_no_more_than_its_client(arguments: tuple[str, ...], api: Api) -> None:
    loaded = _loaded_by(*arguments, "--url", api.url)
    assert (
        loaded & {*HEAVY, "pydantic_settings", "service.settings", "service.client.asynchronous", "pygments"} == set()
    )


def _commands() -> list[tuple[str, str, LazyCommand]]:
    """Panel, name and command, in the order of the list."""
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    found = []
    for name, command in group.commands.items():
        assert isinstance(command, LazyCommand)
        found.append((command.rich_help_panel or "", name, command))
    return found


def test_the_list_of_commands_has_the_summary_of_each() -> None:
    assert [(panel, name) for panel, name, _ in _commands()] == [
        (panel, name) for panel, commands in COMMANDS.items() for name in commands
    ]
    for _, name, command in _commands():
        own = command.load()
        assert own.name == name
        assert command.help == " ".join(own.help.partition("\n\n")[0].split())


@pytest.mark.parametrize("name", [name for commands in COMMANDS.values() for name in commands])
def test_every_command_has_a_help_of_its_own(nanomoe: Run, name: str) -> None:
    done = nanomoe(name, "--help")
    assert done.code == 0
    assert f"Usage: nanomoe {name} " in done.out


def parameter_helps(command: Any, path: str) -> Iterator[tuple[str, str | None]]:
    """The help of every option and argument of a command and of the commands below it, but that of typer's own."""
    for parameter in command.params:
        if not {"--help", "--install-completion", "--show-completion"} & set(parameter.opts):
            yield f"{path} {parameter.name}", getattr(parameter, "help", None)
    for name, below in getattr(command, "commands", {}).items():
        yield from parameter_helps(below.load() if isinstance(below, LazyCommand) else below, f"{path} {name}")


def test_every_option_and_argument_has_a_help_that_stands_alone() -> None:
    found = list(parameter_helps(get_command(app), "nanomoe"))
    assert len(found) > 60
    assert [(where, text) for where, text in found if not stands_alone(text)] == []


def test_the_check_sees_an_option_without_such_a_help() -> None:
    def made_up(
        file: str,
        limit: Annotated[int, typer.Option(help="Of the list.")] = 1,
        name: Annotated[str, typer.Option(help="Name of the job.")] = "",
    ) -> None:
        """A command."""

    wrong = [where for where, text in parameter_helps(as_command(made_up), "made_up") if not stands_alone(text)]
    assert wrong == ["made_up file", "made_up limit"]


def test_an_unknown_command_is_refused_with_a_suggestion(nanomoe: Run) -> None:
    done = nanomoe("sumbit")
    assert done.code == 2
    assert "No such command 'sumbit'. Did you mean 'submit'?" in " ".join(done.err.replace("│", " ").split())
