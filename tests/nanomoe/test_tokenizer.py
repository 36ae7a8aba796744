"""Tokenizers: exact round trips, texts that come in parts, the bundled one's fit, training, threads."""

import hashlib
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as Backend

from nanomoe import tokenizer as module
from nanomoe.assets.make_ptbr_8k import count_words, folded, learn_bpe, listed_words
from nanomoe.tokenizer import (
    BUNDLED_VOCAB_SIZE,
    IncrementalDecoder,
    Tokenizer,
    known_vocab_size,
    load_tokenizer,
    train_bpe,
)
from tests.nanomoe.sample_tokenizers import ASSETS, AWKWARD, BUNDLED, EACH, PARAGRAPH

HELD_OUT = sorted((Path(__file__).parent / "held_out").glob("*.txt"))

TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from([*AWKWARD, " ", "\n", "a", "é", "ção", "uma vez ", "123", "d'água"])
).map("".join)


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


def test_no_entry_of_the_bundled_tokenizer_is_a_listed_vulgar_word() -> None:
    words = {folded(BUNDLED.decode([token])) for token in range(BUNDLED.vocab_size)}
    assert len(words) > 5000
    assert words & listed_words() == set()


def test_learning_without_a_refused_word_is_training_as_ever() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in HELD_OUT)
    learnt = learn_bpe("same", count_words([(text, 1)]), 700, frozenset())
    assert learnt == train_bpe("same", [text], 700)


def test_a_refused_word_is_no_entry_with_or_without_space_capitals_and_accents() -> None:
    text = "A pata e o pato: patas, PATAS, patá, pata-choca e computador. "
    counts = count_words([(text, 100)])
    entries = {refused: learn_bpe("some", counts, 400, refused) for refused in (frozenset(), frozenset({"pata"}))}
    for refused, tokenizer in entries.items():
        words = {folded(tokenizer.decode([token])) for token in range(tokenizer.vocab_size)}
        assert ("pata" in words) is (not refused)
        assert "patas" in words  # a longer word is made of other parts
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_script_makes_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    help_page = tmp_path / "sources/usr/share/help/pt_BR/gnome-help/a.page"
    chapter = tmp_path / "sources/usr/share/doc/debian-handbook/html/pt-BR/a.html"
    vulgar = tmp_path / "sources/safetext/languages/pt/words.txt"
    for path, text in (
        (help_page, '<page xmlns="http://projectmallard.org/1.0/"><p>Olá, <em>mundo</em>!</p></page>'),
        (chapter, '<div>menu<div class="para">Um <b>dia</b>:\n<ul><li>x</li></ul></div></div>'),
        (vulgar, "Você\n\n"),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
    smaller = "m.WORDS_WRITTEN, m.BUNDLED_VOCAB_SIZE = 50_000, 1000"
    code = f"import sys; from nanomoe.assets import make_ptbr_8k as m; {smaller}; m.main(sys.argv[1:])"
    made = []
    for n_threads, seed in (("1", "1"), ("2", "2")):
        out = tmp_path / n_threads
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "sources"), "--out", str(out)],
            env={**os.environ, "RAYON_NUM_THREADS": n_threads, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        )
        made.append([(path.name, path.read_bytes()) for path in sorted(out.iterdir())])
    assert made[0] == made[1]
    tokenizer = Tokenizer.load(tmp_path / "1")
    words = {folded(tokenizer.decode([token])) for token in range(tokenizer.vocab_size)}
    assert "para" in words
    assert words & ({"voce"} | listed_words()) == set()


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
