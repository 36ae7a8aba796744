"""A folder of this machine and one in a bucket do the same, and fail alike: each test runs on both."""

import hashlib
import threading
import time
from pathlib import Path

import httpx
import pytest

from nanomoe import checkpoint
from nanomoe.checkpoint import MANIFEST, CheckpointDamaged
from nanomoe.store import bucket, commit
from nanomoe.store.cache import CacheAddress
from nanomoe.store.opening import open_store
from nanomoe.store.store import Entry, Store, StoreRefused, StoreUnavailable
from tests.buckets import Proxy, Request, S3Server, failure

FILES = {"a.txt": b"one", "empty": b"", "model.safetensors": bytes(range(256)) * 5000}
"""The last one is more than one piece."""


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(str(tmp_path) if request.param == "folder" else request.getfixturevalue("bucket_url"))


def test_what_was_written_is_read_in_full_and_in_ranges(store: Store) -> None:
    folder = store / "jobs/a/f1-25"
    assert not folder.exists()
    folder.write(FILES)
    assert folder.exists()
    assert folder.name == "f1-25"
    for name, content in FILES.items():
        assert folder.stat(name).size == len(content)
        assert folder.read(name) == content
        assert b"".join(folder.pieces(name)) == content
    large = FILES["model.safetensors"]
    for first, last in ((0, 0), (5, 9), (len(large) - 1, len(large) - 1), (0, len(large) - 1)):
        assert b"".join(folder.pieces("model.safetensors", first, last)) == large[first : last + 1]
    assert b"".join(folder.pieces("model.safetensors", 7)) == large[7:]


def test_a_location_opens_the_same_folder_in_another_process(store: Store) -> None:
    (store / "jobs/a").write(FILES)
    assert open_store((store / "jobs/a").location).read("a.txt") == b"one"
    assert open_store(store.location + "/jobs/").location.rstrip("/") == (store / "jobs").location


def test_what_is_not_there_is_not_found(store: Store) -> None:
    (store / "jobs/a").write(FILES)
    for path, name in (("jobs/a", "b.txt"), ("jobs/b", "a.txt"), ("jobs", "a")):
        with pytest.raises(OSError) as raised:  # noqa: PT011 # a folder in a folder's place is one of its own kind
            (store / path).read(name)
        assert isinstance(raised.value, FileNotFoundError | IsADirectoryError)
    with pytest.raises(FileNotFoundError):
        (store / "jobs/b").stat("a.txt")
    with pytest.raises(FileNotFoundError):
        list((store / "jobs/b").pieces("a.txt"))
    assert (store / "jobs/b").last_change() == 0.0
    assert list((store / "nothing").entries(2)) == []


def test_a_folder_is_never_written_twice(store: Store) -> None:
    folder = store / "jobs/a/f1-25"
    checkpoint.write(folder, FILES)
    with pytest.raises(FileExistsError):
        checkpoint.write(folder, {"a.txt": b"two"})
    assert folder.read(MANIFEST)  # who reads by the recorded manifest sees the first one, or that it is damaged


def test_of_several_writers_of_one_file_one_wins(store: Store) -> None:
    (store / "jobs").write({"x": b""})
    refused: list[str] = []
    barrier = threading.Barrier(4)

    def write(content: bytes) -> None:
        barrier.wait()
        try:
            (store / "jobs").put("y", content, create=True)
        except FileExistsError:
            refused.append(content.decode())

    if store.is_local:
        (store / "jobs").put("y", b"0", create=True)
    threads = [threading.Thread(target=write, args=[str(n).encode()]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner = (store / "jobs").read("y").decode()
    assert sorted([*refused, winner]) == ["0", "1", "2", "3"]
    (store / "jobs").put("y", winner.encode(), create=True)  # the same again is no second writer
    (store / "jobs").put("y", b"another")
    assert (store / "jobs").read("y") == b"another"


def test_what_lies_below_a_folder_is_listed_once_and_changed_lately(store: Store) -> None:
    (store / "jobs/a/f1-25").write(FILES)
    (store / "jobs/a/f1-s3").write(FILES)
    (store / "jobs/b").write({"x": b"1"})
    (store / "jobsx").write({"x": b"1"})
    assert sorted((store / "jobs").entries(1), key=lambda entry: entry.path) == [Entry("a", True), Entry("b", True)]
    found = sorted((store / "jobs").entries(2), key=lambda entry: entry.path)
    assert found == [
        Entry("a", True), Entry("a/f1-25", True), Entry("a/f1-s3", True), Entry("b", True), Entry("b/x", False)
    ]  # fmt: skip
    assert abs((store / "jobs/a").last_change() - time.time()) < 60
    assert abs((store / "jobs/b/x").last_change() - time.time()) < 60


def test_what_was_removed_is_gone_and_nothing_else(store: Store) -> None:
    for folder in ("jobs/a/f1-25", "jobs/a/f1-250", "jobs/b"):
        (store / folder).write(FILES)
    (store / "jobs/a/f1-25").remove()
    (store / "jobs/b/empty").remove()
    for _ in range(2):
        (store / "jobs/c").remove()  # no error
        assert not (store / "jobs/a/f1-25").exists()
        assert (store / "jobs/a/f1-250").exists()
        assert (store / "jobs/b").read("a.txt") == b"one"
        with pytest.raises(FileNotFoundError):
            (store / "jobs/b").stat("empty")


@pytest.mark.parametrize("point", ["wrote a.txt", "wrote model.safetensors", "flushed"])
def test_a_checkpoint_without_its_manifest_is_not_seen_and_the_next_attempt_writes_its_own(
    store: Store, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(BaseException):
        pass

    def die(reached: str) -> None:
        if reached == point:
            raise Died

    files = {name: content for name, content in FILES.items() if name != "empty"}
    monkeypatch.setattr(commit, "reached", die)
    with pytest.raises(Died):
        checkpoint.write(store / "jobs/a/f1-25", files)
    monkeypatch.undo() if store.is_local else monkeypatch.setattr(commit, "reached", lambda _: None)
    _, sha256 = checkpoint.write(store / "jobs/b/f1-25", files)
    with pytest.raises(CheckpointDamaged, match=r"f1-25/manifest\.json"):
        checkpoint.open(store / "jobs/a/f1-25", sha256)
    _, sha256 = checkpoint.write(store / "jobs/a/f2-25", files)
    assert checkpoint.open(store / "jobs/a/f2-25", sha256).read_all() == files


def test_every_byte_is_compared_with_what_was_recorded(store: Store) -> None:
    folder = store / "jobs/a/f1-25"
    manifest, sha256 = checkpoint.write(folder, FILES)
    assert checkpoint.verify(folder, sha256) == manifest
    large = FILES["model.safetensors"]
    for content in (large[:-1], large[:-1] + b"?", b""):
        folder.put("model.safetensors", content)
        with pytest.raises(CheckpointDamaged, match=r"f1-25/model\.safetensors"):
            checkpoint.verify(folder, sha256)
        with pytest.raises(CheckpointDamaged, match=r"f1-25/model\.safetensors"):
            checkpoint.open(folder, sha256).read("model.safetensors")
    (folder / "model.safetensors").remove()
    with pytest.raises(CheckpointDamaged, match=r"f1-25/model\.safetensors"):
        checkpoint.verify(folder, sha256)
    folder.put(MANIFEST, b"{}")
    with pytest.raises(CheckpointDamaged, match="not the one that was recorded"):
        checkpoint.open(folder, sha256)


# -- A bucket alone ---------------------------------------------------------------------------------------------------


def test_a_file_in_a_bucket_can_be_read_by_anybody_at_a_signed_url(bucket_url: str, tmp_path: Path) -> None:
    folder = open_store(bucket_url) / "jobs/a/f1-25"
    folder.write(FILES)
    url = folder.signed_url("a.txt", 60)
    assert url is not None
    answer = httpx.get(url, headers={"Range": "bytes=1-"})
    assert (answer.status_code, answer.content) == (206, b"ne")
    assert open_store(str(tmp_path)).signed_url("a.txt", 60) is None


def test_a_large_file_is_sent_in_parts(proxy: Proxy, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "PART_BYTES", 5 << 20)
    content = hashlib.sha256(b"0").digest() * (6 << 15)
    folder = open_store(f"s3://{s3_server.make_bucket()}/a")
    folder.write({"model.safetensors": content, MANIFEST: b"{}"})
    assert sum("partNumber" in request.path for request in proxy.requests) == 2
    assert folder.read("model.safetensors") == content


def test_the_manifest_is_written_once_all_other_files_are_there(proxy: Proxy, s3_server: S3Server) -> None:
    written: list[str] = []
    arrived = threading.Semaphore(0)

    def decide(request: Request) -> float:
        arrived.release()
        return 0.05  # the files are on their way at the same time

    proxy.decide = decide
    name = s3_server.make_bucket()
    checkpoint.write(open_store(f"s3://{name}/a"), FILES)
    written = [request.path.rpartition("/")[2] for request in proxy.requests if request.method == "PUT"]
    assert sorted(written[:-1]) == sorted(FILES)
    assert written[-1] == MANIFEST
    assert [request.headers.get("if-none-match") for request in proxy.requests if request.method == "PUT"] == [
        None, None, None, "*"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "code"),
    [("503 Slow Down", "SlowDown"), ("500 Internal Server Error", "InternalError"), ("429 Too Many Requests", "Busy")],
)
def test_a_failure_that_passes_is_not_noticed(proxy: Proxy, s3_server: S3Server, status: str, code: str) -> None:
    folder = open_store(f"s3://{s3_server.make_bucket()}/a") / "f1-25"
    failed: set[tuple[str, str]] = set()

    def decide(request: Request) -> bytes | None:
        key = (request.method, request.path)
        if key in failed:
            return None
        failed.add(key)
        return failure(status, code)

    proxy.decide = decide
    _, sha256 = checkpoint.write(folder, FILES)
    checkpoint.verify(folder, sha256)
    assert folder.exists()
    folder.remove()
    assert len(failed) >= 4 + 4 + 2


def test_an_answer_that_was_lost_after_the_file_was_written_is_no_second_writer(
    proxy: Proxy, s3_server: S3Server
) -> None:
    name = s3_server.make_bucket()
    lost: list[str] = []

    def decide(request: Request) -> bytes | None:
        if request.headers.get("if-none-match") and not lost:
            lost.append("answer")
            httpx.put(f"{s3_server.url}/{name}/a/manifest.json", content=b"{}")
            return failure("500 Internal Server Error", "InternalError")
        return None

    proxy.decide = decide
    open_store(f"s3://{name}/a").write({"x": b"1", MANIFEST: b"{}"})
    assert lost


def test_a_store_that_knows_no_conditions_is_written_to_all_the_same_and_the_log_says_so(
    proxy: Proxy, s3_server: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    def decide(request: Request) -> bytes | None:
        condition = request.headers.get("if-none-match")
        return failure("501 Not Implemented", "NotImplemented") if condition else None

    proxy.decide = decide
    store = open_store(f"s3://{s3_server.make_bucket()}/a", retry_seconds=1)
    for number in (1, 2):
        checkpoint.write(store / f"f{number}-0", FILES)
        with pytest.raises(FileExistsError):
            checkpoint.write(store / f"f{number}-0", {"a.txt": b"two"})
    assert caplog.text.count("store_without_conditional_put") == 1


@pytest.mark.parametrize("ignores", [False, True])
def test_a_store_that_ignores_conditions_is_found_out(
    proxy: Proxy, s3_server: S3Server, caplog: pytest.LogCaptureFixture, ignores: bool
) -> None:
    store = open_store(f"s3://{s3_server.make_bucket()}/a")
    store.put("installation", b"id")

    def decide(request: Request) -> bytes | None:
        if ignores and "if-none-match" in request.headers:
            return b'HTTP/1.1 200 OK\r\nETag: "x"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n'
        return None

    proxy.decide = decide
    store.check_conditions("installation")
    assert ("store_without_conditional_put" in caplog.text) == ignores
    assert store.read("installation") == b"id"


def test_a_store_out_of_reach_is_unavailable_and_says_nothing_about_the_files(
    proxy: Proxy, s3_server: S3Server
) -> None:
    folder = open_store(f"s3://{s3_server.make_bucket()}/a/f1-25", retry_seconds=0.5)
    _, sha256 = checkpoint.write(folder, FILES)
    proxy.decide = lambda _: failure("503 Service Unavailable", "ServiceUnavailable")
    for use in (
        lambda: checkpoint.open(folder, sha256),
        lambda: checkpoint.verify(folder, sha256),
        lambda: checkpoint.write(folder, FILES),
        folder.exists,
        folder.last_change,
        folder.remove,
        lambda: folder.stat("a.txt"),
    ):
        with pytest.raises(StoreUnavailable) as raised:
            use()
        assert "\n" not in str(raised.value)
    proxy.decide = lambda _: None
    checkpoint.verify(folder, sha256)


def test_a_store_that_says_nothing_is_given_up_after_a_while(
    proxy: Proxy, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "SILENCE_SECONDS", 0.5)
    folder = open_store(f"s3://{s3_server.make_bucket()}/a", retry_seconds=1)
    folder.put("x", b"1")
    proxy.decide = lambda _: 20.0
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        folder.read("x")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("arrives", [False, True])
def test_a_request_that_is_not_answered_is_made_again(
    proxy: Proxy, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    monkeypatch.setattr(bucket, "SILENCE_SECONDS", 0.5)
    name = s3_server.make_bucket()
    folder = open_store(f"s3://{name}/a/f1-25")
    lost: list[str] = []

    def decide(request: Request) -> float | None:
        if request.method == "GET" or request.method in lost:
            return None
        lost.append(request.method)
        if arrives and request.method == "PUT":
            httpx.put(f"{s3_server.url}/{name}/a/f1-25/manifest.json", content=b"{}")
        return 60.0

    proxy.decide = decide
    folder.put(MANIFEST, b"{}", create=True)
    assert folder.read(MANIFEST) == b"{}"
    folder.remove()
    assert not folder.exists()
    assert lost == ["PUT", "POST"]


def test_a_bucket_that_does_not_exist_or_does_not_let_us_in_is_refused(proxy: Proxy) -> None:
    nowhere = open_store("s3://there-is-none/a", retry_seconds=1)
    for use in (lambda: nowhere.read("x"), lambda: nowhere.put("x", b""), nowhere.exists):
        with pytest.raises(StoreRefused, match="NoSuchBucket"):
            use()
    proxy.decide = lambda _: failure("403 Forbidden", "AccessDenied")
    for use in (lambda: nowhere.read("x"), lambda: nowhere.put("x", b""), nowhere.exists):
        with pytest.raises(StoreRefused):
            use()


def test_what_was_read_by_its_hash_is_read_from_this_machine_the_next_time(
    proxy: Proxy, s3_server: S3Server, tmp_path: Path
) -> None:
    cache = CacheAddress(folder=str(tmp_path / "cache"), max_bytes=10 << 20)
    store = open_store(f"s3://{s3_server.make_bucket()}/a", cache)
    _, sha256 = checkpoint.write(store / "f1-0", FILES)
    checkpoint.verify(store / "f1-0", sha256, to_be_read=True)
    n_requests = len(proxy.requests)
    assert checkpoint.open(store / "f1-0", sha256).read_all() == FILES
    assert len(proxy.requests) == n_requests
    (store / "f1-0" / "a.txt").remove()
    assert checkpoint.open(store / "f1-0", sha256).read("a.txt") == b"one"
    with pytest.raises(CheckpointDamaged):  # whoever verifies the store looks there
        checkpoint.verify(store / "f1-0", sha256)
