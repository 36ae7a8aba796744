"""Where a tokenizer may come from: its name, a folder of transformers', the hub; and which ones are refused."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from nanomoe.tokenizer import (
    BUNDLED_VOCAB_SIZE,
    Tokenizer,
    TokenizerError,
    check_tokenizer_name,
    known_vocab_size,
    load_tokenizer,
)
from tests.nanomoe.sample_tokenizers import AWKWARD, BUNDLED, EACH, PARAGRAPH


def refusal(name: str, **allowed: Any) -> TokenizerError:
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(name, **allowed)
    return caught.value


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["ptbr-8k", "bytes", "train:257", "train:65536", "gpt2", "owner/name_1.0", "a-b.c"])
def test_a_name_that_could_exist_is_accepted(name: str) -> None:
    check_tokenizer_name(name)
    known_vocab_size(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", " ", ".", "..", "../x", "x/..", "x/../y", "./x", "/etc/passwd", "/", "x/", "a/b/c", "~/x", "~", "-x"),
        *("C:\\x", "a\\b", "x\0", "\0", "x\n", "bytes\n", "a b", "ação", "http://host/x", "x" * 97, "a//b", ".hidden"),
        *("train:", "train:256", "train:65537", "train:0300", "train:-300", "train:3e3", "train: 300", "train:300 "),
        *("train:1" + "0" * 5000, "train:٣٠٠", "train:300.0", "TRAIN:300", "train:300/x", "ptbr-8k:1"),
    ],
)
def test_a_name_with_tricks_is_refused_before_anything_is_looked_for(name: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError) as caught:
        check_tokenizer_name(name)
    assert caught.value.code == "tokenizer_name_invalid"
    assert refusal(name, text="x", allow_hub=True, allowed_folders=[tmp_path]).code == "tokenizer_name_invalid"
    with pytest.raises(TokenizerError):
        known_vocab_size(name)


def test_an_unknown_name_is_refused_with_the_settings_that_would_allow_it(tmp_path: Path) -> None:
    for folders in ([], [tmp_path]):
        error = refusal("pierreguillou/gpt2-small-portuguese", allowed_folders=folders)
        assert error.code == "hub_not_allowed"
        assert "NANOMOE_ALLOW_HUB" in str(error)
        assert "NANOMOE_TOKENIZER_DIR" in str(error)
    assert known_vocab_size("pierreguillou/gpt2-small-portuguese") is None


# ------------------------------------------------------------------------------------- folders, ours and transformers'


@EACH
def test_a_saved_tokenizer_loads_equal_and_saves_the_same_bytes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, saved in ((first, tokenizer), (second, None)):
        folder.mkdir()
        (saved or Tokenizer.load(first)).save(folder)
    assert sorted(path.name for path in first.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert Tokenizer.load(second) == tokenizer
    assert Tokenizer.load(second).encode(AWKWARD) == tokenizer.encode(AWKWARD)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


@pytest.mark.parametrize("config", [None, {"model_type": "gpt2"}, {"block_size": 100}], ids=["alone", "gpt2", "job"])
@EACH
def test_transformers_opens_what_is_saved(tokenizer: Tokenizer, config: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size
    assert theirs(AWKWARD)["input_ids"] == tokenizer.encode(AWKWARD)
    assert theirs.decode(tokenizer.encode(AWKWARD)) == AWKWARD


def test_a_folder_that_transformers_saved_has_the_same_ids_here(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    special = {"eos_token": "<|endoftext|>", "pad_token": "[PAD]"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(BUNDLED.definition), **special)
    theirs.save_pretrained(tmp_path / "mine")
    ours = load_tokenizer("mine", allowed_folders=[tmp_path / "empty", tmp_path])
    assert ours.name == "mine"
    assert ours.vocab_size == len(theirs) == BUNDLED_VOCAB_SIZE + 2
    assert ours.encode(AWKWARD) == theirs(AWKWARD)["input_ids"]
    assert ours.decode(ours.encode(AWKWARD)) == AWKWARD


def test_an_older_gpt2_folder_of_two_files_has_the_ids_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = json.loads(BUNDLED.definition)["model"]
    vocab = model["vocab"] | {"<|endoftext|>": BUNDLED_VOCAB_SIZE}
    folder = tmp_path / "owner" / "old"
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = "".join(" ".join(merge) + "\n" for merge in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    ours, theirs = load_tokenizer("owner/old", allowed_folders=[tmp_path]), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs) == BUNDLED_VOCAB_SIZE + 1
    assert ours.encode(PARAGRAPH) == theirs(PARAGRAPH)["input_ids"]

    theirs.save_pretrained(tmp_path / "new")
    again = load_tokenizer("new", allowed_folders=[tmp_path])
    assert again.encode(AWKWARD) == theirs(AWKWARD)["input_ids"]


def test_a_length_limit_saved_with_a_tokenizer_never_cuts_a_text(tmp_path: Path) -> None:
    backend = Backend.from_str(BUNDLED.definition)
    backend.enable_truncation(5)
    backend.enable_padding(length=200)
    (tmp_path / "short").mkdir()
    backend.save(str(tmp_path / "short" / "tokenizer.json"))
    assert load_tokenizer("short", allowed_folders=[tmp_path]).encode(PARAGRAPH) == BUNDLED.encode(PARAGRAPH)


def byte_level() -> Backend:
    return Backend.from_str(BUNDLED.definition)


def normalised() -> Backend:
    backend = byte_level()
    backend.normalizer = normalizers.NFC()
    return backend


def with_a_space_before() -> Backend:
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return backend


def without_its_spaces() -> Backend:
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return backend


def read_twice() -> Backend:
    backend = byte_level()
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return backend


def not_down_to_bytes() -> Backend:
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence([])
    return backend


def across_words() -> Backend:
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return backend


def greedy_of_spaces() -> Backend:
    backend = byte_level()
    backend.add_tokens([AddedToken("<fim>", lstrip=True)])
    return backend


def word_piece() -> Backend:
    return Backend(models.WordPiece({"[UNK]": 0, "uma": 1, "##s": 2}))


def sentence_piece() -> Backend:
    backend = Backend(models.BPE({"▁": 0, "a": 1, "▁a": 2}, [("▁", "a")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def of_random_merges() -> Backend:
    model = json.loads(BUNDLED.definition)["model"]
    backend = byte_level()
    backend.model = models.BPE(model["vocab"], [tuple(merge) for merge in model["merges"]], dropout=0.5)
    return backend


def with_a_gap() -> Backend:
    backend = byte_level()
    backend.model = models.BPE(json.loads(BUNDLED.definition)["model"]["vocab"] | {"aaaaaaaaaaa": 9000}, [])
    return backend


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (word_piece, "WordPiece"),
        (sentence_piece, "not made of the 256 bytes"),
        (normalised, "NFC"),
        (with_a_space_before, "space before the text"),
        (without_its_spaces, "removes"),
        (not_down_to_bytes, "down to bytes"),
        (read_twice, "does not"),
        (across_words, "does not split"),
        (greedy_of_spaces, "spaces around"),
        (of_random_merges, "at random"),
        (with_a_gap, "gaps"),
    ],
)
def test_a_tokenizer_that_would_give_other_bytes_is_refused(
    make: Callable[[], Backend], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "odd").mkdir()
    make().save(str(tmp_path / "odd" / "tokenizer.json"))
    error = refusal("odd", allowed_folders=[tmp_path])
    assert error.code == "tokenizer_unsuitable"
    assert reason in str(error)


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({}, "tokenizer_not_found"),
        ({"vocab.json": "{}"}, "tokenizer_not_found"),
        ({"tokenizer.json": ""}, "tokenizer_unsuitable"),
        ({"tokenizer.json": "[1, 2]"}, "tokenizer_unsuitable"),
        ({"tokenizer.json": b"\xff\xfe"}, "tokenizer_unsuitable"),
        ({"tokenizer.json": BUNDLED.definition[:5000]}, "tokenizer_unsuitable"),
        ({"tokenizer.json": BUNDLED.definition, "tokenizer_config.json": "nonsense"}, "tokenizer_unsuitable"),
        ({"tokenizer.json": BUNDLED.definition, "tokenizer_config.json": "[]"}, "tokenizer_unsuitable"),
        (
            {"tokenizer.json": BUNDLED.definition, "tokenizer_config.json": '{"add_prefix_space": true}'},
            "tokenizer_unsuitable",
        ),
        ({"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\nx y\n"}, "tokenizer_unsuitable"),
        (
            {
                "vocab.json": json.dumps(json.loads(BUNDLED.definition)["model"]["vocab"]),
                "merges.txt": "#version: 0.2\n",
                "tokenizer_config.json": '{"tokenizer_class": "CLIPTokenizer"}',
            },
            "tokenizer_unsuitable",
        ),
    ],
)
def test_a_damaged_folder_is_refused_with_a_code(files: dict[str, str | bytes], code: str, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    for name, content in files.items():
        (tmp_path / "odd" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refusal("odd", allowed_folders=[tmp_path]).code == code


def test_links_out_of_the_allowed_folder_are_refused(tmp_path: Path) -> None:
    outside, allowed = tmp_path / "outside", tmp_path / "allowed"
    outside.mkdir()
    (allowed / "partly").mkdir(parents=True)
    BUNDLED.save(outside)
    (allowed / "link").symlink_to(outside, target_is_directory=True)
    (allowed / "partly" / "tokenizer.json").symlink_to(outside / "tokenizer.json")
    for name in ("link", "partly"):
        error = refusal(name, allow_hub=True, allowed_folders=[allowed])
        assert error.code == "tokenizer_not_found"
        assert str(outside) not in str(error)

    inside = allowed / "inside"
    inside.mkdir()
    BUNDLED.save(inside)
    (allowed / "alias").symlink_to(inside, target_is_directory=True)
    assert load_tokenizer("alias", allowed_folders=[allowed]).vocab_size == BUNDLED_VOCAB_SIZE


# ------------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """The address of a small hub that holds `owner/name`, whose tokenizer is the bundled one."""
    BUNDLED.save(tmp_path)
    commit = "0" * 40

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/api/models/owner/name/revision/main":
                self.answer(json.dumps({"id": "owner/name", "sha": commit}).encode())
            elif path == f"/api/models/owner/name/tree/{commit}":
                names = ("tokenizer.json", "model.safetensors")
                files = [{"type": "file", "path": name, "size": 1, "oid": commit} for name in names]
                self.answer(json.dumps(files).encode())
            elif path == f"/owner/name/resolve/{commit}/tokenizer.json":
                self.answer((tmp_path / "tokenizer.json").read_bytes())
            else:
                self.send_error(404, "no such repository or file")

        do_HEAD = do_GET

        def answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Keep the test's output quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


LOAD_FROM_HUB = """
import json, sys
from nanomoe.tokenizer import TokenizerError, load_tokenizer
answers = []
for name in ("owner/name", "owner/other"):
    try:
        answers.append(load_tokenizer(name, allow_hub=True).encode(sys.argv[1]))
    except TokenizerError as error:
        answers.append(error.code)
print(json.dumps({"answers": answers, "loaded": [m for m in ("torch", "transformers") if m in sys.modules]}))
"""


def test_an_allowed_hub_gives_its_tokenizer_without_torch(hub: str, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", LOAD_FROM_HUB, PARAGRAPH], env=environment, check=True, capture_output=True, timeout=60
    )
    answer = json.loads(done.stdout)
    assert answer == {"answers": [BUNDLED.encode(PARAGRAPH), "tokenizer_not_found"], "loaded": []}


def test_a_hub_out_of_reach_is_not_found_at_once() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert refusal("owner/name", allow_hub=True).code == "tokenizer_not_found"
