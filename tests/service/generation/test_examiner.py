"""The examiner keeps what it was asked about last."""

from pathlib import Path

import pytest
import torch

from nanomoe import checkpoint
from service.generation.examiner import Examiner
from service.generation.messages import Failed, Score, Scored
from tests.service.tiny_checkpoint import TinyCheckpoint, write_tiny_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that were opened, by name."""
    opened: list[str] = []
    open_folder = checkpoint.open

    def listed(folder: Path, manifest_sha256: str | None) -> checkpoint.OpenCheckpoint:
        opened.append(folder.name)
        return open_folder(folder, manifest_sha256)

    monkeypatch.setattr(checkpoint, "open", listed)
    return opened


def ask(examiner: Examiner, tiny: TinyCheckpoint) -> object:
    question = Score(id=1, folder=str(tiny.folder), manifest_sha256=tiny.manifest_sha256, text="abc")
    return examiner.answer(question)


def test_a_checkpoint_that_is_asked_about_again_is_not_read_again(tmp_path: Path, read: list[str]) -> None:
    examiner = Examiner(CPU)
    a, b = (write_tiny_checkpoint(tmp_path / name, seed=seed) for seed, name in enumerate("ab"))
    answers = [ask(examiner, tiny) for tiny in (a, b, a, b)]
    assert read == ["a", "b"]
    assert answers[:2] == answers[2:]
    assert answers[0] != answers[1]


def test_the_model_asked_about_longest_ago_goes_first(tmp_path: Path, read: list[str]) -> None:
    a, b, c = (write_tiny_checkpoint(tmp_path / name, seed=seed) for seed, name in enumerate("abc"))
    size = sum(tensor.nbytes for tensor in a.weights.values())
    examiner = Examiner(CPU, kept_bytes=2 * size)
    for tiny in (a, b, a, c):
        ask(examiner, tiny)
    assert list(examiner._kept) == [a.manifest_sha256, c.manifest_sha256]
    ask(examiner, b)
    assert read == ["a", "b", "c", "b"]


def test_a_model_larger_than_all_that_is_kept_is_answered_from_and_dropped(tmp_path: Path) -> None:
    examiner = Examiner(CPU, kept_bytes=10)
    assert isinstance(ask(examiner, write_tiny_checkpoint(tmp_path / "a")), Scored)
    assert list(examiner._kept) == []


def test_a_checkpoint_that_cannot_be_read_is_not_kept(tmp_path: Path) -> None:
    tiny = write_tiny_checkpoint(tmp_path / "a")
    weights = tiny.folder / checkpoint.WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(b"torn")
    examiner = Examiner(CPU)
    assert isinstance(ask(examiner, tiny), Failed)
    weights.write_bytes(whole)
    assert isinstance(ask(examiner, tiny), Scored)
