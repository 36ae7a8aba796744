"""Makes the bundled tokenizer `ptbr-8k`: byte-level BPE with 8,192 entries for Brazilian Portuguese.

Byte-level BPE needs only how often each word occurs, so it learns from the Portuguese word counts of `wordfreq`, and
from a little prose what word counts lack: punctuation, digits and capital letters. No entry is a word of two lists of
vulgar words: an untrained model shows its vocabulary to learners at random.
The same inputs give the same bytes; `README.md` beside this file names the inputs, their versions and the commands.
Knows nothing of the rest of the library but how a tokenizer is built and saved.
"""

import argparse
import hashlib
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from heapq import heapify, heappop, heappush
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import wordfreq
from tokenizers import decoders, pre_tokenizers

from nanomoe.tokenizer import BUNDLED, BUNDLED_VOCAB_SIZE, Tokenizer, byte_level_bpe

WORDS_WRITTEN = 4_000_000
"""Words of running text that the counts are scaled to. Three times as many change the fit by 0.2 % (measured)."""

CAPITALISED_SHARE = 0.04
"""Assumed share of names and of sentences' first words after a space: `wordfreq` counts in lower case."""

OPENING_SHARE = 0.02
"""Assumed share of capitalised words with nothing before them, as at the start of a line or after a quotation mark."""

MIN_COUNT = 2
"""Occurrences of a pair below which it is not merged."""

HANDBOOK = "usr/share/doc/debian-handbook/html/pt-BR"
GNOME_HELP = "usr/share/help/pt_BR"
VULGAR_WORDS = "safetext/languages/pt/words.txt"


def folded(text: str) -> str:
    """The text as words are compared: no space around it, lower case, no accents."""
    decomposed = unicodedata.normalize("NFD", text.strip().casefold())
    return "".join(character for character in decomposed if not unicodedata.combining(character))


def listed_words() -> frozenset[str]:
    """The vulgar Portuguese words of the package `glin-profanity`, folded."""
    dictionary = resources.files("glin_profanity") / "data/dictionaries/portuguese.json"
    words: list[str] = json.loads(dictionary.read_text(encoding="utf-8"))["words"]
    return frozenset(map(folded, words))


def vulgar_words(folder: Path) -> frozenset[str]:
    """`listed_words`, and those of the package `safetext` in `folder`.

    Raises:
        FileNotFoundError: the package is not there.
    """
    words = (folder / VULGAR_WORDS).read_text(encoding="utf-8").splitlines()
    return listed_words() | {folded(word) for word in words if word.strip()}


def scaled_counts(refused: Set[str]) -> Iterator[tuple[str, int]]:
    """The Portuguese words of `wordfreq` but the refused ones, and how often each occurs in `WORDS_WRITTEN` words.

    Each comes three times: after a space in lower case, after a space with a capital letter, and with one alone.
    """
    frequencies = wordfreq.get_frequency_dict("pt", wordlist="large")
    for word, frequency in sorted(frequencies.items()):
        if any(character.isdigit() for character in word) or folded(word) in refused:
            continue  # wordfreq writes every digit of a number as 0
        n_words = frequency * WORDS_WRITTEN
        capitalised = word[0].upper() + word[1:]
        yield f" {word}", round(n_words * (1 - CAPITALISED_SHARE - OPENING_SHARE))
        yield f" {capitalised}", round(n_words * CAPITALISED_SHARE)
        yield capitalised, round(n_words * OPENING_SHARE)


def prose(folder: Path) -> Iterator[str]:
    """The Portuguese paragraphs of both manuals, in the order of their file names.

    Raises:
        FileNotFoundError: a manual is not in `folder`.
    """
    pages = sorted((folder / GNOME_HELP).rglob("*.page"))
    chapters = sorted((folder / HANDBOOK).glob("*.html"))
    if not pages or not chapters:
        raise FileNotFoundError(f"{folder} must hold {GNOME_HELP} and {HANDBOOK}")
    for page in pages:
        yield from _mallard_paragraphs(page)
    for chapter in chapters:
        yield from _html_paragraphs(chapter)


def _mallard_paragraphs(page: Path) -> Iterator[str]:
    namespace = "{http://projectmallard.org/1.0/}"
    for element in ElementTree.parse(page).iter():  # noqa: S314 - files of a signed Debian package
        if element.tag in (f"{namespace}p", f"{namespace}title", f"{namespace}desc"):
            yield from _cleaned("".join(element.itertext()))


class _Paragraphs(HTMLParser):
    """Collects the text of `<div class="para">`, where the handbook keeps its prose."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._divs: list[bool] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "div":
            self._divs.append(("class", "para") in attrs)
            if self._divs[-1]:
                self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "div":
            self._divs.pop()

    def handle_data(self, data: str) -> None:
        if any(self._divs):
            self.found[-1] += data


def _html_paragraphs(chapter: Path) -> Iterator[str]:
    parser = _Paragraphs()
    parser.feed(chapter.read_text(encoding="utf-8"))
    for paragraph in parser.found:
        yield from _cleaned(paragraph)


def _cleaned(paragraph: str) -> Iterator[str]:
    """The paragraph on one line; nothing if it is empty or was left in English."""
    line = " ".join(paragraph.split())
    if line and not re.search(r"\b(the|and|of|with)\b", line):
        yield line + "\n"


def count_words(pieces: Iterable[tuple[str, int]]) -> Counter[str]:
    """How often each word, as the tokenizer splits them, occurs in pieces that are repeated so many times."""
    split = byte_level_bpe().pre_tokenizer.pre_tokenize_str
    counts = Counter[str]()
    for piece, times in pieces:
        if times:
            for word, _ in split(piece):
                counts[word] += times
    return counts


def learn_bpe(name: str, counts: Mapping[str, int], vocab_size: int, refused: Set[str]) -> Tokenizer:
    """What `nanomoe.tokenizer.train_bpe` learns of these words, but a pair that would make a refused entry is never
    merged: the words that contain it are made of other parts.

    `counts`: words in GPT-2's alphabet. `refused`: entries that must not be, folded.
    """
    entries = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {entry: number for number, entry in enumerate(entries)}
    words = [[ids[character] for character in word] for word in counts]
    times = list(counts.values())
    pairs: Counter[tuple[int, int]] = Counter()
    words_of: dict[tuple[int, int], set[int]] = defaultdict(set)
    for number, word in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += times[number]
            words_of[pair].add(number)
    queue = [(-count, pair) for pair, count in pairs.items()]
    heapify(queue)
    merges: list[tuple[str, str]] = []
    text_of = decoders.ByteLevel()
    while len(entries) < vocab_size and queue:
        count, pair = heappop(queue)
        if -count != pairs[pair]:  # it has changed since: to be looked at in its new place
            heappush(queue, (-pairs[pair], pair))
            continue
        if -count < MIN_COUNT:
            break
        left, right = entries[pair[0]], entries[pair[1]]
        if folded(text_of.decode([left + right])) in refused:
            continue
        merges.append((left, right))
        if left + right not in ids:
            ids[left + right] = len(entries)
            entries.append(left + right)
        changed = set()
        for number in words_of.pop(pair):
            word = words[number]
            for old in pairwise(word):
                pairs[old] -= times[number]
            words[number] = word = _merged(word, pair, ids[left + right])
            for new in pairwise(word):
                pairs[new] += times[number]
                words_of[new].add(number)
                changed.add(new)
        for new in changed:
            heappush(queue, (-pairs[new], new))
    return Tokenizer(name, byte_level_bpe(ids, merges).to_str())


def _merged(word: Sequence[int], pair: tuple[int, int], entry: int) -> list[int]:
    """The word with the pair replaced by the entry, from left to right."""
    merged: list[int] = []
    at = 0
    while at < len(word):
        if tuple(word[at : at + 2]) == pair:
            merged.append(entry)
            at += 2
        else:
            merged.append(word[at])
            at += 1
    return merged


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the tokenizer's folder and print the checksum of its vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, help="folder into which the packages were extracted")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / BUNDLED, help="folder to write")
    options = parser.parse_args(arguments)
    refused = vulgar_words(options.sources)
    pieces = [*scaled_counts(refused), *((paragraph, 1) for paragraph in prose(options.sources))]
    tokenizer = learn_bpe(BUNDLED, count_words(pieces), BUNDLED_VOCAB_SIZE, refused)
    assert tokenizer.vocab_size == BUNDLED_VOCAB_SIZE
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(options.out)
    print(hashlib.sha256((options.out / "tokenizer.json").read_bytes()).hexdigest(), options.out / "tokenizer.json")


if __name__ == "__main__":
    main()
