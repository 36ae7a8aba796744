"""The declared metrics against files and rows that earlier versions wrote, and against the HTTP answer."""

import json
import math
import sqlite3
import tarfile
from pathlib import Path

import pytest
from pydantic import ValidationError

from nanomoe import checkpoint
from nanomoe.evaluation.metrics import (
    CheckpointMetrics,
    MixtureFigures,
    MixtureLayer,
    MixtureMetrics,
    Position,
    perplexity,
)
from service.http import schemas

RECORDED = Path(__file__).parents[2] / "upgrade" / "revision_0001.tar.xz"
LEAST = {"percent": 25, "step": 3, "epoch": 1, "loss": 1.0, "perplexity": 2.72, "bits_per_byte": 1.44, "accuracy": 0.5}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of an earlier version."""
    folder = tmp_path_factory.mktemp("recorded")
    with tarfile.open(RECORDED) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # noqa: S202 - filter: since 3.11.4
    return folder / "data"


def test_every_file_of_an_earlier_version_is_read_and_written_with_its_own_bytes(recorded: Path) -> None:
    files = sorted(recorded.rglob(checkpoint.METRICS))
    assert len(files) > 10
    for file in files:
        metrics = CheckpointMetrics.model_validate_json(file.read_bytes())
        assert checkpoint.to_json(metrics.to_file()) == file.read_bytes()


def test_every_row_of_an_earlier_version_is_read_and_written_as_it_was(recorded: Path) -> None:
    with sqlite3.connect(recorded / "nanomoe.db") as db:
        rows = db.execute("SELECT percent, step, epoch, metrics FROM checkpoints").fetchall()
    assert len(rows) > 10
    for percent, step, epoch, stored in rows:
        content = json.loads(stored)
        metrics = CheckpointMetrics.model_validate(content | {"percent": percent, "step": step, "epoch": epoch})
        assert metrics.to_row() == content


def test_the_file_of_a_mixture_keeps_the_order_of_its_fields() -> None:
    layer = MixtureLayer(
        **dict.fromkeys(MixtureFigures.model_fields, 0.5), layer=1, load=[1.0], importance=[1.0], loss_without=None,
        cards=[[]],
    )  # fmt: skip
    figures = MixtureFigures(**dict.fromkeys(MixtureFigures.model_fields, 0.5))
    metrics = CheckpointMetrics(**LEAST, moe=MixtureMetrics(layers=[layer], mean=figures, max=figures))
    metrics = metrics.model_copy(update={"train_loss": 2.0, "stopped_early": True})
    found = metrics.to_file()
    assert list(found) == [
        "percent", "step", "epoch", "loss", "perplexity", "bits_per_byte", "train_loss", "accuracy", "moe",
        "stopped_early",
    ]  # fmt: skip
    assert list(found["moe"]["layers"][0]) == [
        "layer", "load", "importance", "loss_without", *MixtureFigures.model_fields, "cards"
    ]  # fmt: skip


def test_what_a_later_version_measures_is_kept_and_what_was_not_measured_is_not_invented() -> None:
    later = CheckpointMetrics.model_validate(LEAST | {"top_5_accuracy": 0.9})
    assert later.to_file() == LEAST | {"top_5_accuracy": 0.9}
    assert later.to_row() == {
        name: value for name, value in later.to_file().items() if name not in Position.model_fields
    }


def test_a_number_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValidationError, match="finite"):
        CheckpointMetrics.model_validate(LEAST | {"loss": math.nan})


def test_the_http_answer_adds_what_knows_a_clock_or_the_other_checkpoints_and_nothing_else() -> None:
    assert issubclass(schemas.CheckpointMetrics, CheckpointMetrics)
    answered = list(schemas.CheckpointMetrics.model_fields)
    assert [name for name in answered if name not in ("created_at", "tok_per_sec", "best")] == list(
        CheckpointMetrics.model_fields
    )
    assert answered[:4] == ["percent", "step", "epoch", "created_at"]
    assert answered[8:11] == ["train_loss", "tok_per_sec", "val_loss"]


def test_a_perplexity_too_large_for_a_number_is_null() -> None:
    assert perplexity(1.0) == pytest.approx(math.e)
    assert perplexity(800.0) is None
