"""Makes the bundled tokenizer `ptbr-8k`: byte-level BPE with 8,192 entries for Brazilian Portuguese.

Byte-level BPE needs only how often each word occurs, so it learns from the Portuguese word counts of `wordfreq`,
written out word by word, and a little prose for what word counts lack: punctuation, digits and capital letters.
The same inputs give the same bytes; `README.md` beside this file names the inputs, their versions and the command.
Knows nothing of the rest of the library but how a tokenizer is trained and saved.
"""

import argparse
import hashlib
import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import wordfreq

from nanomoe.tokenizer import BUNDLED, BUNDLED_VOCAB_SIZE, train_bpe

WORDS_WRITTEN = 4_000_000
"""Words of running text that the counts are scaled to. Three times as many change the fit by 0.4 % (measured)."""

CAPITALISED_SHARE = 0.04
"""Assumed share of names and of sentences' first words after a space: `wordfreq` counts in lower case."""

OPENING_SHARE = 0.02
"""Assumed share of capitalised words with nothing before them, as at the start of a line or after a quotation mark."""

HANDBOOK = "usr/share/doc/debian-handbook/html/pt-BR"
GNOME_HELP = "usr/share/help/pt_BR"


def written_out_counts() -> Iterator[str]:
    """The Portuguese words of `wordfreq`, each as often as it occurs in `WORDS_WRITTEN` words."""
    frequencies = wordfreq.get_frequency_dict("pt", wordlist="large")
    for word, frequency in sorted(frequencies.items()):
        if any(character.isdigit() for character in word):
            continue  # wordfreq writes every digit of a number as 0
        n_words = frequency * WORDS_WRITTEN
        capitalised = word[0].upper() + word[1:]
        yield f" {word}" * round(n_words * (1 - CAPITALISED_SHARE - OPENING_SHARE))
        yield f" {capitalised}" * round(n_words * CAPITALISED_SHARE)
        for _ in range(round(n_words * OPENING_SHARE)):
            yield capitalised


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


def training_text(prose_folder: Path) -> Iterator[str]:
    """Everything the tokenizer learns from, in pieces that no word crosses."""
    yield from written_out_counts()
    yield from prose(prose_folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the tokenizer's folder and print the checksum of its vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prose", type=Path, help="folder into which both Debian packages were extracted")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / BUNDLED, help="folder to write")
    options = parser.parse_args(arguments)
    tokenizer = train_bpe(BUNDLED, training_text(options.prose), BUNDLED_VOCAB_SIZE)
    assert tokenizer.vocab_size == BUNDLED_VOCAB_SIZE
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(options.out)
    print(hashlib.sha256((options.out / "tokenizer.json").read_bytes()).hexdigest(), options.out / "tokenizer.json")


if __name__ == "__main__":
    main()
