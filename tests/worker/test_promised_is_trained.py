"""What a submission promises is what the trainer records, whatever tokenizer a job has, and whoever its parent is.

The name of a tokenizer may mean something else by the time a job is trained: the bundled one is made again, a folder is
written anew, the hub moves on. Checkpoints and snapshots carry files, and these decide.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nanomoe import checkpoint
from nanomoe.config import InitFrom, JobConfig
from nanomoe.tokenizer import Tokenizer, load_tokenizer
from nanomoe.training.steps.kept import KeptSteps
from service.jobs.submission import TOKENISED_AT_ONCE_BYTES, Parent, assess
from service.settings import Settings
from tests.nanomoe.sample_tokenizers import other_meaning
from tests.service.tiny_checkpoint import TinyCheckpoint, write_tiny_checkpoint
from worker.channel import Channel
from worker.job_trainer import Writer, _train, prepare_run
from worker.protocol import (
    Assignment,
    CheckpointWritten,
    Folder,
    FromTrainer,
    Prepared,
    SnapshotWritten,
    Start,
    Train,
    encode,
    parse_to_trainer,
)

SHAPE = {
    "block_size": 32,
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 8,
    "batch_size": 2,
    "epochs": 2,
    "cont_prefix_tokens": 4,
}
TEXT = "O rato roeu a roupa do rei de Roma, e a rainha resolveu remendar o que sobrou. " * 3
OTHER = "Era uma vez um gato que dormia no telhado e sonhava com o rato. " * 3
NOBODY = "0" * 32
NAMES = ["bytes", "ptbr-8k", "train:300", "meu", "dona/dela"]
"""Built in, trained on the text, in a local folder, and on the hub."""


class RecordingChannel(Channel):
    """A channel that ends here."""

    def __init__(self) -> None:
        self.messages: list[FromTrainer] = []

    def send(self, message: FromTrainer, assignment: Assignment | None = None) -> None:
        self.messages.append(message)


class Unstopped:
    """Supervision of a job that nobody stops."""

    def stop_of(self, assignment: Assignment) -> None:
        """Nothing stops any job."""


@dataclass
class Place:
    """Where tokenizers lie, and where a job is trained."""

    folder: Path
    settings: Settings

    def start(self, config: JobConfig, text: str = TEXT, **origin: Any) -> Start:
        (self.folder / "text.txt").write_text(text, encoding="utf-8")
        start = Start.model_validate(
            {
                "job_id": NOBODY,
                "fence": 1,
                "config": config,
                "text_path": str(self.folder / "text.txt"),
                "folder": str(self.folder / "job"),
                "execution": None,
                "resume": None,
                "parent": None,
                "device": "cpu",
                "snapshot_seconds": 0.0,
                "allow_hub": self.settings.allow_hub,
                "tokenizer_dir": str(self.settings.tokenizer_dir),
            }
            | origin
        )
        # As the trainer's process reads it, every field named.
        received = parse_to_trainer(encode(Train(starts=[start])))
        assert isinstance(received, Train)
        (read,) = received.starts
        return read

    def train(self, start: Start) -> list[FromTrainer]:
        """Everything that the trainer says of the job."""
        channel = RecordingChannel()
        writer = Writer(channel, Path(start.folder), start.fence)
        _train(start, channel, Unstopped(), writer, KeptSteps())  # type: ignore[arg-type]
        writer.close()
        return channel.messages


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    for where in ("tokenizers/meu", "hub"):
        (tmp_path / where).mkdir(parents=True)
    load_tokenizer("train:400", text=OTHER).save(tmp_path / "tokenizers" / "meu")
    load_tokenizer("train:280", text=OTHER).save(tmp_path / "hub")
    monkeypatch.setattr("nanomoe.tokenizer._download", lambda name: tmp_path / "hub")
    settings = Settings(_env_file=None, data_dir=tmp_path, tokenizer_dir=tmp_path / "tokenizers", allow_hub=True)
    return Place(tmp_path, settings)


def promised_and_prepared(
    place: Place, config: JobConfig, text: str = TEXT, parent: TinyCheckpoint | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a submission says of a job, and what the trainer does."""
    origin: Mapping[str, Any] = {}
    of_parent = None
    if parent is not None:
        folder = Folder(folder=str(parent.folder), manifest_sha256=parent.manifest_sha256)
        origin = {"parent": folder}
        tokenizer = checkpoint.open(parent.folder, parent.manifest_sha256).tokenizer()
        of_parent = Parent("0" * 32, parent.config, tokenizer, hashlib.sha256(OTHER.encode()).hexdigest())
    found = assess(text, config, place.settings, of_parent)
    channel = RecordingChannel()
    run = prepare_run(place.start(config, text, **origin), channel, KeptSteps())
    (said,) = channel.messages
    assert isinstance(said, Prepared)
    assert len(run.model.transformer.wte.weight) == run.tokenizer.vocab_size
    assert sum(p.numel() for p in run.model.parameters()) == said.n_params
    new = found.new_job()
    promised = {
        "n_tokens": new.n_tokens,
        "total_steps": new.total_steps,
        "n_params": new.n_params,
        "n_active_params": new.n_active_params,
        "warnings": [w.code for w in found.warnings if w.code != "tokenizer_of_parent"],
    }
    return promised, {name: getattr(said, name) for name in promised if name != "warnings"} | {
        "warnings": [warning.code for warning in said.warnings]
    }


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_job_is_what_was_promised(place: Place, name: str, use_moe: bool) -> None:
    config = JobConfig.model_validate(SHAPE | {"tokenizer": name, "use_moe": use_moe, "moe_stride": 1, "min_lr": 1e-5})
    promised, prepared = promised_and_prepared(place, config)
    assert promised == prepared
    assert set(prepared["warnings"]) - {"tokenizer_far_from_text"} == {"settings_unused"} | (
        set() if use_moe else {"moe_settings_unused"}
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_child_is_what_was_promised_by_the_tokenizer_in_its_parents_files(place: Place, name: str) -> None:
    of_parent = load_tokenizer(name, text=OTHER, allow_hub=True, allowed_folders=[place.folder / "tokenizers"])
    if name != "bytes":
        of_parent = other_meaning(of_parent)
    parent = write_tiny_checkpoint(place.folder / "parent", tokenizer=of_parent, **SHAPE)
    config = parent.config.model_copy(update={"init_from": InitFrom(job_id=NOBODY)})
    # The parent's files are all that is needed: neither the hub nor the folder is asked.
    place.settings = place.settings.model_copy(update={"allow_hub": False})
    (place.folder / "tokenizers" / "meu" / "tokenizer.json").unlink()
    promised, prepared = promised_and_prepared(place, config, parent=parent)
    assert promised == prepared
    assert prepared["n_tokens"] == len(of_parent.encode(TEXT))


def test_what_is_known_only_in_training_is_not_promised(place: Place) -> None:
    text = "palavra " * (TOKENISED_AT_ONCE_BYTES // 8 + 1)
    config = JobConfig.model_validate(SHAPE | {"tokenizer": "train:300"})
    promised, prepared = promised_and_prepared(place, config, text)
    assert {name: value for name, value in promised.items() if value is not None and name != "warnings"} == {}
    assert prepared["n_tokens"] > 1000


# What was begun with an earlier `ptbr-8k`, which had as many entries and other ones, goes on with the files it has.


def earlier_bundle() -> Tokenizer:
    return other_meaning(load_tokenizer("ptbr-8k"))


def test_a_job_begun_with_an_earlier_bundle_goes_on_with_the_one_in_its_snapshot(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = JobConfig.model_validate(SHAPE | {"epochs": 8})
    earlier, todays = earlier_bundle(), load_tokenizer("ptbr-8k")
    with monkeypatch.context() as before:
        before.setattr("nanomoe.tokenizer._bundled", lambda: earlier)
        said = place.train(place.start(config, folder=str(place.folder / "undisturbed")))
    snapshot = next(message for message in said if isinstance(message, SnapshotWritten))
    folder = place.folder / "undisturbed" / snapshot.folder
    assert load_tokenizer("ptbr-8k") is todays

    resumed = place.train(
        place.start(config, resume=Folder(folder=str(folder), manifest_sha256=snapshot.manifest_sha256))
    )
    first = resumed[0]
    assert isinstance(first, Prepared)
    assert first.resumed_at_step == snapshot.step > 0
    assert first.n_tokens == len(earlier.encode(TEXT)) != len(todays.encode(TEXT))
    written = [message for message in resumed if isinstance(message, CheckpointWritten)]
    assert written[-1].metrics.percent == 100
    for message in written:
        assert Tokenizer.load(place.folder / "job" / message.folder) == earlier
    ended = {m.metrics.percent: m.manifest_sha256 for m in said if isinstance(m, CheckpointWritten)}
    assert {m.metrics.percent: m.manifest_sha256 for m in written}.items() <= ended.items()


def test_a_job_that_starts_again_at_step_0_goes_on_with_the_tokenizer_it_began_with(place: Place) -> None:
    made = write_tiny_checkpoint(place.folder / "earlier", tokenizer=earlier_bundle(), **SHAPE)
    channel = RecordingChannel()
    folder = Folder(folder=str(made.folder), manifest_sha256=made.manifest_sha256)
    run = prepare_run(place.start(made.config, tokenizer=folder), channel, KeptSteps())
    assert run.tokenizer == made.tokenizer
    assert run.windows.tokens == made.tokenizer.encode(TEXT)
    (said,) = channel.messages
    assert isinstance(said, Prepared)
    assert said.resumed_at_step is None


def test_a_job_that_was_counted_with_an_earlier_bundle_and_not_begun_says_what_it_trains_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = JobConfig.model_validate(SHAPE)
    earlier = earlier_bundle()
    with monkeypatch.context() as before:
        before.setattr("nanomoe.tokenizer._bundled", lambda: earlier)
        counted = assess(TEXT, config, place.settings, None)
    channel = RecordingChannel()
    run = prepare_run(place.start(config), channel, KeptSteps())
    (said,) = channel.messages
    assert isinstance(said, Prepared)
    assert said.n_tokens == len(run.windows.tokens) == len(load_tokenizer("ptbr-8k").encode(TEXT)) != counted.n_tokens
