"""How figures and a model's text are shown."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from service.cli import checkpoint_text, job_text, text
from service.http import schemas


@given(st.text())
def test_a_text_shown_on_one_line_cannot_drive_a_terminal(given_text: str) -> None:
    shown = text.visible(given_text)
    assert len(shown) == len(given_text)
    assert not any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 for c in shown)
    assert text.visible_lines(given_text).count("\n") == given_text.count("\n")


def test_an_escape_sequence_is_shown_as_what_it_is() -> None:
    assert text.visible("a\x1b[31mb\r\n\x7f\x9bção") == "a␛[31mb␍␊␡␡ção"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (60, "1 min 00 s"),
        (3599.4, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (90000, "1 d 1 h"),
    ],
)
def test_a_duration_is_short(seconds: float, shown: str) -> None:
    assert text.duration(seconds) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "–"), (1.23456, "1.2346"), (164.55, "164.6"), (8285.93, "8,285.9"), (1e12, "1e+12")]
)
def test_a_figure_is_short_whatever_its_size(value: float | None, shown: str) -> None:
    assert text.figure(value) == shown


def test_a_row_has_its_header_s_columns_whatever_the_figures() -> None:
    figures = schemas.CheckpointMetrics.model_validate_json(
        '{"percent": 100, "step": 999999, "epoch": 1, "created_at": "2026-01-01T00:00:00Z", "loss": 709.1234,'
        ' "perplexity": 1e300, "bits_per_byte": 1023.1, "accuracy": 1, "tok_per_sec": 9999999}'
    )
    header, row = checkpoint_text.quarter_header().plain, checkpoint_text.quarter_row(figures).plain
    assert len(header) == len(row) <= 80
    assert row.split() == ["100", "%", "999,999", "709.1234", "1e+300", "100.0", "%", "1,023.100", "9,999,999"]


@given(st.text(max_size=400), st.integers(40, 120), st.integers(1, 4))
def test_a_labelled_text_keeps_to_its_lines_and_its_width(given_text: str, width: int, n_lines: int) -> None:
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    shown = text.labelled("continues", Text(text.visible(given_text)), console, n_lines)
    lines = shown.split("\n", allow_blank=True)
    assert len(lines) <= n_lines
    assert max(line.cell_len for line in lines) <= width


def test_wrong_tokens_of_a_reconstruction_are_red() -> None:
    reconstruction = schemas.Reconstruction.model_validate_json(
        '{"text": "gata", "tokens": [{"target": "gat", "predicted": "gat", "loss": 0.1},'
        ' {"target": "o", "predicted": "a", "loss": 3}]}'
    )
    checkpoint = schemas.CheckpointMetrics.model_construct(reconstruction=reconstruction, continuation=None, moe=None)
    (line,) = checkpoint_text.quarter_texts(checkpoint, Console(width=80))
    coloured = {line.plain[span.start : span.end]: str(span.style) for span in line.spans}
    assert coloured["gat"] == text.GOOD
    assert coloured["a"] == text.WRONG


@pytest.mark.parametrize("n_lines", [1, 3])
def test_a_continuation_shows_where_its_prefix_ends_however_long_that_is(n_lines: int) -> None:
    for prefix, shown in (("Era uma vez", "continues Era uma vez│ um gato"), ("ab" * 200, "ababab│ um gato")):
        continuation = schemas.Continuation(prompt=prefix, text=" um gato")
        checkpoint = schemas.CheckpointMetrics.model_construct(reconstruction=None, continuation=continuation, moe=None)
        (line,) = checkpoint_text.quarter_texts(checkpoint, Console(width=80), n_lines)
        assert line.plain.endswith(shown)
        assert line.plain.count("\n") < n_lines


def test_a_mixture_shows_how_evenly_it_routes() -> None:
    mean = schemas.MixtureFigures(load_cv=0.31234, max_violation=0.5, dropped_fraction=0.0)
    moe = schemas.MixtureMetrics(layers=[], mean=mean, max=mean)
    checkpoint = schemas.CheckpointMetrics.model_construct(reconstruction=None, continuation=None, moe=moe)
    (line,) = checkpoint_text.quarter_texts(checkpoint, Console(width=80))
    assert line.plain == "       experts load_cv 0.312, max_violation 0.500, dropped 0.0 %, churn –"


def job(**fields: object) -> schemas.JobView:
    return schemas.JobView.model_construct(**{"status": "queued", "status_reason": None} | fields)


@pytest.mark.parametrize(
    ("position", "seconds", "told"),
    [
        (None, None, ""),
        (0, None, "next"),
        (0, 0, ""),
        (0, 42, "next, may start in about 42 s"),
        (1, 200, "1 ahead, may start in about 3 min 20 s"),
        (1000, None, "1,000 ahead"),
    ],
)
def test_a_queued_job_shows_its_queue_position_and_estimated_start(
    position: int | None, seconds: float | None, told: str
) -> None:
    start = None if seconds is None else datetime.now(UTC) + timedelta(seconds=seconds)
    assert job_text.queue_text(job(queue_position=position, estimated_start_at=start)) == told


def test_a_running_job_has_no_queue_position() -> None:
    assert job_text.queue_text(job(status="running", queue_position=None, estimated_start_at=None)) == ""


def test_a_warning_is_broken_where_a_terminal_ends_and_one_line_in_a_pipe() -> None:
    terminal = job_text.warning_line("code", "word " * 30, Console(width=40, force_terminal=True)).plain.split("\n")
    assert len(terminal) > 3
    assert all(len(line) <= 40 for line in terminal)
    assert all(line.startswith("  w") for line in terminal[1:])
    assert "\n" not in job_text.warning_line("code", "word " * 30, Console(width=40)).plain


def test_the_current_activity_is_shown_in_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seen, quiet in ((False, False), (True, True)):
        monkeypatch.setattr("sys.stdout.isatty", lambda seen=seen: seen)
        monkeypatch.setattr("sys.stderr.isatty", lambda seen=seen: seen)
        with text.waiting("loading JOB@100", quiet=quiet):
            pass
        assert capsys.readouterr() == ("", "")
    with text.waiting("loading JOB@100"):
        pass
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "loading JOB@100 ..." in shown.err


def test_a_hint_names_the_command_as_it_was_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "bin" / "nanomoe"
    script.parent.mkdir()
    script.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(script)])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert text.program() == "bin/nanomoe"
    monkeypatch.setenv("PATH", str(script.parent))
    assert text.program() == "nanomoe"


def test_the_curve_falls_as_the_loss_does() -> None:
    assert checkpoint_text.curve([8, 4, 2, None, 1]) == "█▄▂ ▁"
    assert checkpoint_text.curve([1, 1]) == "▁▁"
    assert checkpoint_text.curve([None]) == ""
    steps = schemas.StepSeries(step=[1, 2], train_loss=[9.0, 1.0], lr=[0, 0], grad_norm=[0, 0])
    assert checkpoint_text.loss_curve(steps, Console(width=80)).plain == "    train loss 9.000 █▁ 1.000"
