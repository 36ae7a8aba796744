import os
from pathlib import Path

import pytest
import torch

from nanomoe import checkpoint
from nanomoe.checkpoint import CheckpointDamaged
from nanomoe.evaluation.metrics import CheckpointMetrics
from nanomoe.store import commit
from tests.service.tiny_checkpoint import write_tiny_checkpoint

FILES = {"a.txt": b"one", "b.bin": bytes(range(256)), "config.json": checkpoint.to_json({})}


def test_what_was_written_is_read_back_and_verified(tmp_path: Path) -> None:
    manifest, sha256 = checkpoint.write(tmp_path / "f1-25", FILES)
    assert [(entry.name, entry.size) for entry in manifest.files] == [("a.txt", 3), ("b.bin", 256), ("config.json", 3)]
    assert checkpoint.verify(tmp_path / "f1-25", sha256) == manifest
    assert checkpoint.open(tmp_path / "f1-25", sha256).read_all() == FILES
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

    monkeypatch.setattr(commit, "reached", die)
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

    monkeypatch.setattr(commit, "reached", die)
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


def test_a_folder_has_its_name_only_after_every_file_was_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[int] = set()
    seen: dict[str, bool] = {}

    def look(point: str) -> None:
        if point == "flushed":
            unfinished = tmp_path / "c.tmp"
            seen["all"] = {path.stat().st_ino for path in (unfinished, *unfinished.iterdir())} <= flushed

    monkeypatch.setattr("os.fsync", lambda descriptor: flushed.add(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(commit, "reached", look)
    checkpoint.write(tmp_path / "c", FILES)
    assert seen == {"all": True}


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


def test_a_model_is_loaded_with_its_config_its_tokenizer_and_its_metrics(tmp_path: Path) -> None:
    made = write_tiny_checkpoint(tmp_path / "c", use_moe=True)
    for sha256 in (made.manifest_sha256, None):
        model, config, tokenizer = checkpoint.load_model(checkpoint.open(made.folder, sha256))
        assert (config, tokenizer, model.training) == (made.config, made.tokenizer, False)
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, made.weights[name])


def test_metrics_are_read_as_they_were_measured(tmp_path: Path) -> None:
    measured = {"percent": 25, "step": 3, "epoch": 1, "loss": 1.0, "perplexity": 2.7, "bits_per_byte": 1, "accuracy": 0}
    metrics = CheckpointMetrics.model_validate(measured)
    _, sha256 = checkpoint.write(tmp_path / "c", {checkpoint.METRICS: checkpoint.to_json(metrics.to_file())})
    assert checkpoint.open(tmp_path / "c", sha256).metrics() == metrics


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_is_verified_when_it_is_read_and_no_other_is_touched(tmp_path: Path, name: str) -> None:
    made = write_tiny_checkpoint(tmp_path / "c")
    content = (made.folder / name).read_bytes()
    (made.folder / name).write_bytes(content.replace(b"0", b"1", 1) if name != "model.safetensors" else content[:-1])
    opened = checkpoint.open(made.folder, made.manifest_sha256)
    parts = {"config.json": opened.config, "tokenizer.json": opened.tokenizer, "model.safetensors": opened.weights}
    for file, part in parts.items():
        if file == name:
            with pytest.raises(CheckpointDamaged, match=f"c/{name}"):
                part()
        else:
            part()


def test_a_loaded_model_has_read_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_tiny_checkpoint(tmp_path / "c")
    read: list[str] = []
    read_bytes = Path.read_bytes

    def counted(path: Path) -> bytes:
        read.append(path.name)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    checkpoint.load_model(checkpoint.open(made.folder, made.manifest_sha256))
    assert sorted(read) == [
        "config.json", "manifest.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip


def test_a_folder_that_is_not_the_recorded_one_is_not_opened(tmp_path: Path) -> None:
    made = write_tiny_checkpoint(tmp_path / "c")
    with pytest.raises(CheckpointDamaged, match="not the one that was recorded"):
        checkpoint.open(made.folder, "0" * 64)
    with pytest.raises(CheckpointDamaged, match=r"c holds no metrics\.json"):
        checkpoint.open(made.folder, made.manifest_sha256).metrics()


def test_json_files_hold_no_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.to_json({"loss": float("nan")})
