"""Which checkpoints stay loaded, and what happens to one that cannot be."""

from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from nanomoe.checkpoint import CONFIG, MANIFEST, WEIGHTS
from nanomoe.config import SamplingConfig
from nanomoe.tokenizer import TOKENIZER_FILES, load_tokenizer
from service.generation.examiner import Examiner
from service.generation.messages import Cancel, EngineDone, Failed, Inspect, Inspected, Score, Scored
from tests.nanomoe.sample_tokenizers import PARAGRAPH, other_meaning
from tests.service.generation.driver import Driver, reference_tokens
from tests.service.tiny_checkpoint import TinyCheckpoint, write_tiny_checkpoint


@pytest.fixture
def tiny(tmp_path: Path) -> TinyCheckpoint:
    return write_tiny_checkpoint(tmp_path / "tiny")


def test_a_checkpoint_is_read_with_the_tokenizer_in_its_files_whatever_its_name_means_now(
    tmp_path: Path,
) -> None:
    earlier = other_meaning(load_tokenizer("ptbr-8k"))
    made = write_tiny_checkpoint(tmp_path / "earlier", tokenizer=earlier)
    driver = Driver()
    request_id = driver.ask(made.request("Era uma vez", 8))
    driver.finish(request_id)
    expected = reference_tokens(made, "Era uma vez", 8, SamplingConfig(temperature=0))
    (chunk,) = driver.chunks(request_id)
    assert (list(chunk.tokens), chunk.text) == (expected, earlier.decode(expected))

    there = {"id": 1, "folder": str(made.folder), "manifest_sha256": made.manifest_sha256}
    for question in (Score(**there, text=PARAGRAPH), Inspect(**there, prompt="Era uma vez")):
        answer = Examiner(torch.device("cpu")).answer(question)
        assert isinstance(answer, Scored | Inspected)
        text = PARAGRAPH if isinstance(question, Score) else "Era uma vez"
        assert [token.token for token in answer.tokens] == earlier.encode(text)
        assert "".join(token.text for token in answer.tokens) == text
    assert earlier.encode(PARAGRAPH) != load_tokenizer("ptbr-8k").encode(PARAGRAPH)


def test_a_full_cache_drops_the_least_recently_used_checkpoint(tmp_path: Path) -> None:
    a, b, c = (write_tiny_checkpoint(tmp_path / name, seed=n) for n, name in enumerate("abc"))
    measuring = Driver()
    measuring.finish(measuring.ask(a.request()))
    n_bytes = sum(loaded.engine.n_bytes for loaded in measuring.cache._loaded.values())
    driver = Driver(cache_bytes=int(2.5 * n_bytes))
    for tiny in (a, b, a, c):
        driver.finish(driver.ask(tiny.request()))
    assert driver.cache.manifests == [a.manifest_sha256, c.manifest_sha256]


def test_a_checkpoint_in_use_is_never_dropped(tmp_path: Path) -> None:
    a, b = (write_tiny_checkpoint(tmp_path / name, seed=n) for n, name in enumerate("ab"))
    driver = Driver(cache_bytes=1)
    long = driver.ask(a.request(max_new_tokens=10_000))
    while not driver.sent[long]:
        driver.turn()
    other = driver.ask(b.request())
    for _ in range(50):
        driver.turn()
    assert driver.sent[other] == [], "it waits for room"
    driver.server.receive(Cancel(id=long))
    driver.finish(other)
    assert driver.cache.manifests == [b.manifest_sha256]


def test_a_damaged_checkpoint_fails_its_requests_only(tmp_path: Path) -> None:
    good, bad, lost = (write_tiny_checkpoint(tmp_path / name, seed=n) for n, name in enumerate(("good", "bad", "lost")))
    weights = bad.folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    (lost.folder / "tokenizer.json").unlink()
    driver = Driver()
    served, damaged, unreadable = (driver.ask(tiny.request()) for tiny in (good, bad, lost))
    driver.finish(served, damaged, unreadable)
    assert isinstance(driver.sent[served][-1], EngineDone)
    failures = [driver.sent[i][-1] for i in (damaged, unreadable)]
    assert all(isinstance(failure, Failed) for failure in failures)
    assert [failure.code for failure in failures if isinstance(failure, Failed)] == [
        "checkpoint_damaged",
        "checkpoint_damaged",
    ]
    assert driver.cache.manifests == [good.manifest_sha256]


def test_a_checkpoint_that_makes_no_model_is_reported(tmp_path: Path) -> None:
    tiny = write_tiny_checkpoint(tmp_path / "odd", bias=False, claimed={"n_layer": 3})
    driver = Driver()
    request_id = driver.ask(tiny.request())
    with capture_logs() as logged:
        driver.finish(request_id)
    (failure,) = driver.sent[request_id]
    assert isinstance(failure, Failed)
    assert failure.code == "checkpoint_unreadable"
    assert "transformer.h.2" in failure.message
    assert [(entry["event"], entry["exc_info"]) for entry in logged] == [("checkpoint_unreadable", True)]


def test_every_file_of_a_checkpoint_is_read_once(tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    read_bytes = Path.read_bytes

    def listed(path: Path) -> bytes:
        names.append(path.name)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", listed)
    driver = Driver()
    driver.finish(driver.ask(tiny.request()))
    assert sorted(names) == sorted([MANIFEST, CONFIG, WEIGHTS, *TOKENIZER_FILES])
