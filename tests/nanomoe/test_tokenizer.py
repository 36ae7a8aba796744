"""Tokenizers: exact round trips, the bundled one's fit, training, and which foreign ones are let in from where."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from nanomoe import tokenizer as module
from nanomoe.tokenizer import (
    BUNDLED_VOCAB_SIZE,
    IncrementalDecoder,
    Tokenizer,
    TokenizerError,
    check_tokenizer_name,
    known_vocab_size,
    load_tokenizer,
    train_bpe,
)

ASSETS = Path(module.__file__).parent / "assets"
PARAGRAPH = (ASSETS / "paragraph.pt.txt").read_text(encoding="utf-8")
HELD_OUT = sorted((Path(__file__).parent / "held_out").glob("*.txt"))

BUNDLED = load_tokenizer("ptbr-8k")
TOKENIZERS = [BUNDLED, load_tokenizer("bytes"), load_tokenizer("train:320", text=PARAGRAPH)]

# A family emoji, a flag, control characters, line ends, NUL, combining and bidirectional marks, the byte order mark.
AWKWARD = (
    "  Olá\r\n\tmundo \0\x07\x1b[0m\x7f\x85 e\u0301 a\u0303o \U0001f469\u200d\U0001f469\u200d\U0001f467 "
    "\U0001f1e7\U0001f1f7 \ufeff\u202e\u2028\ufffd\U0010ffff <|endoftext|> [UNK] Ġ Ċ  \n\n "
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from([*AWKWARD, " ", "\n", "a", "é", "ção", "uma vez ", "123", "d'água"])
).map("".join)
EACH = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: tokenizer.name)


def refusal(name: str, **allowed: Any) -> TokenizerError:
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(name, **allowed)
    return caught.value


# ------------------------------------------------------------------------------------------------------ round trips


@EACH
@given(text=TEXTS)
@example(text="")
@example(text=AWKWARD)
@example(text="".join(map(chr, range(0x300))))
def test_any_text_comes_back_exactly_and_the_bytes_of_its_tokens_add_up_to_it(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@EACH
def test_ids_number_every_entry_and_each_stands_for_bytes(tokenizer: Tokenizer) -> None:
    entries = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    assert all(entries)
    assert len(set(entries)) == tokenizer.vocab_size
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(KeyError):
            tokenizer.token_bytes(token)


def test_the_bytes_tokenizer_is_the_text_itself() -> None:
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.vocab_size == known_vocab_size("bytes") == 256
    assert tokenizer.encode(AWKWARD) == list(AWKWARD.encode())


def test_no_text_triggers_a_special_token() -> None:
    ids = BUNDLED.encode("<|endoftext|>")
    assert len(ids) > 1
    assert BUNDLED.decode(ids) == "<|endoftext|>"


def test_bytes_that_are_no_character_become_the_replacement_character() -> None:
    assert load_tokenizer("bytes").decode([*b"a", 0xC3, *b"b"]) == "a\ufffdb"


# Merges of spaces, line ends and signs: a cut at the wrong place changes the tokens around it.
SPACED = load_tokenizer("train:500", text="uma  vez\n\n um.\n\n\n dia \n\n,  \n-se -se\n  .\n\n   fim" * 20)


def split_as_llama_3() -> Tokenizer:
    """Line ends stick to the sign before them, and a word to the one sign before it."""
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend = Backend.from_str(SPACED.definition)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return Tokenizer("llama", backend.to_str())


SPACED_TEXTS = st.lists(st.sampled_from([" ", " ", "\n", "\n", "\r", ".", ",", "-", "uma", "vez", "1"])).map("".join)
WHOLE = {tokenizer: Backend.from_str(tokenizer.definition) for tokenizer in [BUNDLED, SPACED, split_as_llama_3()]}


@pytest.mark.parametrize("tokenizer", WHOLE, ids=lambda tokenizer: tokenizer.name)
@given(text=TEXTS | SPACED_TEXTS)
@example(text="".join(path.read_text(encoding="utf-8") for path in HELD_OUT))
def test_a_long_text_cut_in_pieces_has_the_tokens_of_the_whole(tokenizer: Tokenizer, text: str) -> None:
    whole = WHOLE[tokenizer].encode(text, add_special_tokens=False).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE_CHARACTERS", 1)
        patch.setattr(module, "_PIECES_AT_ONCE", 2)
        assert tokenizer.encode(text) == whole


def test_a_long_text_is_cut_between_words() -> None:
    text = PARAGRAPH * 1000
    pieces = list(module._pieces(text))
    assert len(pieces) == 6
    assert "".join(pieces) == text
    assert all(re.match(r" [^\W\d_]", piece) for piece in pieces[1:])


# ------------------------------------------------------------------------------------------- text that comes in parts


@EACH
@given(data=st.data())
def test_pushed_ids_give_the_text_of_all_of_them(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)))))
    decoder = IncrementalDecoder(tokenizer)
    parts = [decoder.push(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    assert "".join(parts) + decoder.finish() == tokenizer.decode(ids)


@EACH
@given(text=TEXTS)
@example(text=AWKWARD)
def test_no_part_ends_inside_a_character(tokenizer: Tokenizer, text: str) -> None:
    decoder = IncrementalDecoder(tokenizer)
    so_far, n_bytes = "", 0
    for token in tokenizer.encode(text):
        so_far += decoder.push([token])
        n_bytes += len(tokenizer.token_bytes(token))
        assert text.startswith(so_far)
        assert 0 <= n_bytes - len(so_far.encode()) < 4  # what is held back is less than a character
    assert decoder.finish() == ""
    assert so_far == text


def test_a_character_whose_end_never_came_is_replaced_at_the_finish() -> None:
    decoder = IncrementalDecoder(load_tokenizer("bytes"))
    assert decoder.push("é".encode()[:1]) == ""
    assert decoder.finish() == "\ufffd"


# ----------------------------------------------------------------------------------------------------- the bundled one


def test_the_bundled_tokenizer_fits_held_out_portuguese() -> None:
    paragraphs = [text for path in HELD_OUT for text in path.read_text(encoding="utf-8").strip().split("\n\n")]
    n_bytes = sum(len(paragraph.encode()) for paragraph in paragraphs)
    n_tokens = sum(len(BUNDLED.encode(paragraph)) for paragraph in paragraphs)
    assert len(paragraphs) == 12
    assert n_bytes / n_tokens >= 3.8


def test_the_example_paragraph_has_60_to_100_tokens_and_ten_of_them_make_a_prompt() -> None:
    ids = BUNDLED.encode(PARAGRAPH)
    assert 60 <= len(ids) <= 100
    assert BUNDLED.decode(ids[:10]) == "Era uma vez uma menina que guardava palavras num"


def test_the_bundled_file_is_the_one_whose_making_is_documented() -> None:
    documented = re.findall(r"`([0-9a-f]{64})`\.", (ASSETS / "README.md").read_text(encoding="utf-8"))
    assert documented == [hashlib.sha256((ASSETS / "ptbr-8k" / "tokenizer.json").read_bytes()).hexdigest()]
    assert BUNDLED.vocab_size == BUNDLED_VOCAB_SIZE == known_vocab_size("ptbr-8k")
    assert load_tokenizer("ptbr-8k") is BUNDLED


def test_the_script_makes_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    help_page = tmp_path / "prose/usr/share/help/pt_BR/gnome-help/a.page"
    chapter = tmp_path / "prose/usr/share/doc/debian-handbook/html/pt-BR/a.html"
    for path, text in (
        (help_page, '<page xmlns="http://projectmallard.org/1.0/"><p>Olá, <em>mundo</em>!</p></page>'),
        (chapter, '<div>menu<div class="para">Um <b>dia</b>:\n<ul><li>x</li></ul></div></div>'),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
    smaller = "m.WORDS_WRITTEN, m.BUNDLED_VOCAB_SIZE = 50_000, 1000"
    code = f"import sys; from nanomoe.assets import make_ptbr_8k as m; {smaller}; m.main(sys.argv[1:])"
    made = []
    for n_threads, seed in (("1", "1"), ("2", "2")):
        out = tmp_path / n_threads
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "prose"), "--out", str(out)],
            env={**os.environ, "RAYON_NUM_THREADS": n_threads, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        )
        made.append([(path.name, path.read_bytes()) for path in sorted(out.iterdir())])
    assert made[0] == made[1]


def test_the_script_reads_the_prose_of_both_manuals(tmp_path: Path) -> None:
    from nanomoe.assets.make_ptbr_8k import GNOME_HELP, HANDBOOK, prose

    with pytest.raises(FileNotFoundError, match="must hold"):
        list(prose(tmp_path))
    (tmp_path / GNOME_HELP).mkdir(parents=True)
    (tmp_path / HANDBOOK).mkdir(parents=True)
    (tmp_path / GNOME_HELP / "a.page").write_text(
        '<page xmlns="http://projectmallard.org/1.0/"><info><credit><name>Ninguém</name></credit></info>'
        "<p>Olá,\n <em>mundo</em>!</p></page>",
        encoding="utf-8",
    )
    (tmp_path / HANDBOOK / "a.html").write_text(
        '<div>menu<div class="para">Um <b>dia</b>.</div><div class="para">Left in the original.</div></div>',
        encoding="utf-8",
    )
    assert list(prose(tmp_path)) == ["Olá, mundo!\n", "Um dia.\n"]


# ------------------------------------------------------------------------------------------------- trained on the text


def test_training_gives_equal_bytes_in_processes_with_other_thread_counts() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in HELD_OUT)
    code = (
        "import sys; from nanomoe.tokenizer import load_tokenizer;"
        "sys.stdout.write(load_tokenizer('train:600', text=sys.stdin.read()).definition)"
    )
    made = {
        subprocess.run(
            [sys.executable, "-X", "utf8", "-c", code],
            input=text,
            env={**os.environ, "RAYON_NUM_THREADS": n_threads, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            encoding="utf-8",
        ).stdout
        for n_threads, seed in (("1", "1"), ("2", "2"))
    }
    assert made == {load_tokenizer("train:600", text=text).definition}


def test_training_learns_the_text_and_has_no_more_entries_than_asked_for() -> None:
    text = PARAGRAPH * 3
    trained = load_tokenizer("train:400", text=text)
    assert trained.name == "train:400"
    assert trained.vocab_size == known_vocab_size("train:400") == 400
    assert len(trained.encode(text)) < len(text.encode()) / 2


@pytest.mark.parametrize("text", ["", "a", "\0", "é", AWKWARD])
def test_a_text_too_short_to_learn_from_leaves_the_bytes(text: str) -> None:
    trained = load_tokenizer("train:65536", text=text)
    assert 256 <= trained.vocab_size < 300
    assert trained.decode(trained.encode(text)) == text


@pytest.mark.parametrize("text", ["a" * 300_000, " " * 300_000, "\n" * 300_000, "-" * 300_000, "é1" * 100_000])
def test_a_text_without_words_trains_on_runs_of_bounded_length(text: str) -> None:
    trained = load_tokenizer("train:1000", text=text)
    assert max(len(trained.token_bytes(token).decode(errors="ignore")) for token in range(trained.vocab_size)) <= 64
    assert trained.decode(trained.encode(text)) == text


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


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: tokenizer.name)
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


# ----------------------------------------------------------------------------------------------------------- threads


def test_importing_loads_nothing_heavy_and_a_bundled_tokenizer_no_torch() -> None:
    code = (
        "import sys; import nanomoe.tokenizer as t; first = set(sys.modules);"
        "t.load_tokenizer('ptbr-8k').encode('Era uma vez');"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'numpy'};"
        "print(sorted((heavy | {'tokenizers'}) & first), sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[] []"


def test_threads_encode_side_by_side_with_the_same_result() -> None:
    texts = [path.read_text(encoding="utf-8") for path in HELD_OUT] * 20
    fresh = Tokenizer("fresh", BUNDLED.definition)  # whichever thread comes first builds its parts
    with ThreadPoolExecutor(8) as pool:
        encoded = list(pool.map(fresh.encode, texts))
    assert encoded == [BUNDLED.encode(text) for text in texts]


def test_train_bpe_lets_no_token_cross_from_one_piece_to_the_next() -> None:
    trained = train_bpe("two", ["ab", "cd"] * 50, 300)
    entries = {trained.token_bytes(token) for token in range(256, trained.vocab_size)}
    assert entries == {b"ab", b"cd"}
