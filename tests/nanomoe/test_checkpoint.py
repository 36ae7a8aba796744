import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from nanomoe import checkpoint
from nanomoe.checkpoint import CheckpointDamaged
from nanomoe.config import JobConfig

FILES = {"a.txt": b"one", "b.bin": bytes(range(256)), "config.json": checkpoint.to_json({})}


def test_what_was_written_is_read_back_and_verified(tmp_path: Path) -> None:
    manifest, sha256 = checkpoint.write(tmp_path / "f1-25", FILES)
    assert [(entry.name, entry.size) for entry in manifest.files] == [("a.txt", 3), ("b.bin", 256), ("config.json", 3)]
    assert checkpoint.verify(tmp_path / "f1-25", sha256) == manifest
    assert checkpoint.read_all(tmp_path / "f1-25", sha256) == FILES
    assert [p.name for p in tmp_path.iterdir()] == ["f1-25"]


def test_equal_files_give_an_equal_manifest(tmp_path: Path) -> None:
    _, first = checkpoint.write(tmp_path / "a", FILES)
    _, second = checkpoint.write(tmp_path / "b", dict(reversed(FILES.items())))
    assert first == second


@pytest.mark.parametrize("name", [*FILES, checkpoint.MANIFEST])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_wrong_byte_a_short_file_and_a_missing_file_are_damage(tmp_path: Path, name: str, harm: str) -> None:
    _, sha256 = checkpoint.write(tmp_path / "c", FILES)
    path = tmp_path / "c" / name
    content = path.read_bytes()
    if harm == "flip":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif harm == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    with pytest.raises(CheckpointDamaged, match=name):
        checkpoint.verify(tmp_path / "c", sha256)


@pytest.mark.parametrize("point", ["wrote a.txt", "wrote b.bin", "wrote manifest.json", "flushed"])
def test_death_before_the_rename_leaves_no_folder_and_the_next_attempt_succeeds(
    tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(reached: str) -> None:
        if reached == point:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "reached", die)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(tmp_path / "c", FILES)
    assert not (tmp_path / "c").exists()
    monkeypatch.undo()
    _, sha256 = checkpoint.write(tmp_path / "c", FILES)
    checkpoint.verify(tmp_path / "c", sha256)


def test_without_the_other_name_death_leaves_a_folder_that_looks_whole_and_bars_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "reached", die)
    monkeypatch.setattr(Path, "with_name", lambda self, name: self)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(tmp_path / "c", FILES)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["a.txt"]
    with pytest.raises(FileExistsError):
        checkpoint.write(tmp_path / "c", FILES)


@pytest.mark.parametrize("protected", [True, False], ids=["flushed", "without flushing"])
def test_after_a_power_cut_there_is_what_was_flushed_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protected: bool
) -> None:
    on_disk: set[int] = set()

    def flush(descriptor: int) -> None:
        if protected:
            on_disk.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr("os.fsync", flush)
    _, sha256 = checkpoint.write(tmp_path / "c", FILES)
    for path in (tmp_path / "c").iterdir():
        if path.stat().st_ino not in on_disk:
            path.write_bytes(b"")  # how a journalling file system brings back a file that was renamed too early
    if protected:
        checkpoint.verify(tmp_path / "c", sha256)
        assert {(tmp_path / "c").stat().st_ino, tmp_path.stat().st_ino} <= on_disk
    else:
        with pytest.raises(CheckpointDamaged):
            checkpoint.verify(tmp_path / "c", sha256)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(tmp_path / "c", FILES)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_never_written_twice(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "c", FILES)
    with pytest.raises(FileExistsError):
        checkpoint.write(tmp_path / "c", FILES)


def test_weights_and_config_are_read_by_name(tmp_path: Path) -> None:
    config = JobConfig(n_layer=1)
    files = {
        checkpoint.WEIGHTS: save({"transformer.wte.weight": torch.ones(2, 3)}),
        checkpoint.CONFIG: checkpoint.to_json(config.model_dump(mode="json")),
    }
    checkpoint.write(tmp_path / "c", files)
    assert checkpoint.load_weights(tmp_path / "c")["transformer.wte.weight"].shape == (2, 3)
    assert checkpoint.read_config(tmp_path / "c") == config


def test_json_files_hold_no_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.to_json({"loss": float("nan")})
