"""Copies of a bucket's files: right or not there, within their budget, whoever else uses them."""

import hashlib
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest

from nanomoe.store import cache as module
from nanomoe.store.cache import FileCache

CONTENTS = [bytes([n]) * 1000 for n in range(8)]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def kept(cache: FileCache, content: bytes) -> bool:
    return cache.read(sha256(content)) == content


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_what_was_kept_is_read_in_one_and_in_pieces(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 10_000)
    assert cache.read(sha256(b"one")) is None
    assert cache.pieces(sha256(b"one")) is None
    cache.keep(sha256(b"one"), b"one")
    assert cache.read(sha256(b"one")) == b"one"
    pieces = cache.pieces(sha256(b"one"))
    assert pieces is not None
    assert b"".join(pieces) == b"one"
    streamed = cache.keeping(sha256(b"twothree"), iter([b"two", b"three"]), 8)
    assert list(streamed) == [b"two", b"three"]
    assert kept(cache, b"twothree")


def test_nothing_is_kept_that_is_another_content_or_did_not_come_to_its_end(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 10_000)
    assert list(cache.keeping(sha256(b"right"), iter([b"wrong"]), 5)) == [b"wrong"]
    half = cache.keeping(sha256(b"onetwo"), iter([b"one", b"two"]), 6)
    assert next(half) == b"one"
    half.close()  # type: ignore[attr-defined]
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("read", ["read", "pieces"])
def test_a_damaged_copy_is_not_read_and_not_kept(tmp_path: Path, read: str, caplog: pytest.LogCaptureFixture) -> None:
    cache = FileCache(tmp_path / "cache", 10_000)
    cache.keep(sha256(b"one"), b"one")
    (tmp_path / "cache" / sha256(b"one")).write_bytes(b"two")
    assert getattr(cache, read)(sha256(b"one")) is None
    assert "store_cache_damaged" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == []
    cache.keep(sha256(b"one"), b"one")
    assert kept(cache, b"one")


def test_the_least_recently_read_goes_first_and_the_budget_holds(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 3500)
    for n, content in enumerate(CONTENTS[:3]):
        cache.keep(sha256(content), content)
        os.utime(tmp_path / "cache" / sha256(content), (n, n))
    assert kept(cache, CONTENTS[0])  # and so it is the most recently read
    cache.keep(sha256(CONTENTS[3]), CONTENTS[3])
    assert [kept(cache, content) for content in CONTENTS[:4]] == [True, False, True, True]
    large = bytes(3501)
    assert list(cache.keeping(sha256(large), iter([large]), len(large))) == [large]
    assert not kept(cache, large)
    assert size_of(tmp_path / "cache") == 3000


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 2500)
    cache.keep(sha256(CONTENTS[0]), CONTENTS[0])
    old, new = (tmp_path / "cache" / f"{'0' * 64}.{n}.tmp" for n in "ab")
    for left in (old, new):
        left.write_bytes(bytes(1200))
    then = time.time() - module._ABANDONED_SECONDS - 60
    os.utime(old, (then, then))
    cache.keep(sha256(CONTENTS[1]), CONTENTS[1])
    assert (old.exists(), new.exists()) == (False, True)
    assert [kept(cache, content) for content in CONTENTS[:2]] == [False, True]  # what is being written counts


def test_a_cache_that_cannot_be_written_to_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = FileCache(tmp_path / "file", 10_000)
    assert list(cache.keeping(sha256(b"one"), iter([b"one"]), 3)) == [b"one"]
    assert cache.read(sha256(b"one")) is None
    assert "store_cache_not_written" in caplog.text


def use_many_times(folder: Path, seed: int) -> None:
    cache, chance = FileCache(folder, 3500), random.Random(seed)  # noqa: S311
    for _ in range(300):
        content = chance.choice(CONTENTS)
        found = cache.read(sha256(content))
        assert found in (None, content)
        pieces = cache.pieces(sha256(content))
        assert pieces is None or b"".join(pieces) == content
        if found is None:
            cache.keep(sha256(content), content)


def test_several_processes_use_one_cache(tmp_path: Path) -> None:
    started = multiprocessing.get_context("forkserver")
    processes = [started.Process(target=use_many_times, args=[tmp_path / "cache", seed]) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert all(path.name == sha256(path.read_bytes()) for path in (tmp_path / "cache").iterdir())
    # Each makes room for its own file: as many more may have come at the same moment.
    assert size_of(tmp_path / "cache") <= 3500 + 2 * 1000
