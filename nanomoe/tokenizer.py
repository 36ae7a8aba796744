"""Text to token ids and back, byte for byte: every tokenizer here is a byte-level BPE or plain bytes.

A tokenizer is its `tokenizer.json`, the Hugging Face format: a checkpoint carries it as a file, and transformers opens
it. Files are read with `tokenizers` alone; transformers takes seconds to import and brings torch along.
Knows no model, no checkpoint and no settings: the caller says which folders, and whether the hub, may be used.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from nanomoe.errors import NanomoeError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

BUNDLED = "ptbr-8k"
BUNDLED_VOCAB_SIZE = 8192
MIN_VOCAB_SIZE = 256
"""Every tokenizer has an entry for each byte."""

TRAINED_VOCAB_SIZES = range(MIN_VOCAB_SIZE + 1, 65_537)
"""The N of `train:N`: at least one merge beyond the 256 bytes, at most what 16 bits number."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
"""The files that a tokenizer is saved as."""

ErrorCode = Literal["tokenizer_name_invalid", "tokenizer_not_found", "hub_not_allowed", "tokenizer_unsuitable"]

_ASSETS = Path(__file__).parent / "assets"
_HUB_OR_FOLDER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,95})?")

_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}{1,64}| ?\p{N}{1,64}| ?[^\s\p{L}\p{N}]{1,64}|\s{1,64}(?!\S)|\s{1,64}"
"""GPT-2's pattern, but a run is cut after 64 characters: the time to train grows with the square of the longest word,
40 s instead of 0.02 s for 256 KiB of one letter (measured)."""

_FOREIGN_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")

_PIECE_CHARACTERS = 65_536
_PIECES_AT_ONCE = 8
_CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S\n)(?=[^\W\d_])")
"""Where a long text may be cut without changing a token: before a single space between two letters, and before a
letter that opens a line."""

_ANY_TEXT = "".join(map(chr, range(0x250))) + "  e\u0301 \U0001f469\u200d\U0001f467 \r\n\t <|endoftext|>  fim  "


class TokenizerError(NanomoeError, ValueError):
    """A tokenizer that cannot be loaded or trained, and why."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back: `decode(encode(text)) == text` for any text."""

    name: str
    """What the config called it."""

    definition: str = field(repr=False)
    """The content of `tokenizer.json`."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote, a checkpoint's folder for instance.

        Raises:
            OSError: a file is missing or cannot be read.
        """
        return cls.of_files({name: (folder / name).read_bytes() for name in TOKENIZER_FILES})

    @classmethod
    def of_files(cls, files: Mapping[str, bytes]) -> Self:
        """The tokenizer whose `files` these are; others among them are left alone."""
        config = json.loads(files["tokenizer_config.json"])
        return cls(config["name_or_path"], files["tokenizer.json"].decode())

    def files(self) -> dict[str, bytes]:
        """The files that transformers' AutoTokenizer opens, by name; equal tokenizers give equal bytes."""
        config = {
            "clean_up_tokenization_spaces": False,
            "name_or_path": self.name,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        return {
            "tokenizer.json": self.definition.encode(),
            "tokenizer_config.json": json.dumps(config, indent=2).encode() + b"\n",
        }

    def save(self, folder: Path) -> None:
        """Write `files` into a folder."""
        for name, content in self.files().items():
            (folder / name).write_bytes(content)

    @property
    def vocab_size(self) -> int:
        """Number V of entries; ids are 0 to V - 1."""
        return len(self._bytes_of)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, which must be encodable as UTF-8 (no lone surrogates). Other threads run meanwhile."""
        if self.definition == _byte_definition():
            return list(text.encode())
        ids: list[int] = []
        for pieces in _in_batches(_pieces(text)):
            for encoding in self._backend.encode_batch_fast(pieces, add_special_tokens=False):
                ids += encoding.ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8, a character cut in half for instance, become U+FFFD."""
        return b"".join([self._bytes_of[token] for token in ids]).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that one id stands for; they may be a part of a character. Raises KeyError for no id."""
        return self._bytes_of[token]

    @cached_property
    def _backend(self) -> "Backend":
        from tokenizers import Tokenizer as Backend

        return Backend.from_str(self.definition)

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        bytes_of = {token: added.content.encode() for token, added in self._backend.get_added_tokens_decoder().items()}
        byte_of = {character: byte for byte, character in _byte_alphabet().items()}
        for entry, token in self._backend.get_vocab(with_added_tokens=False).items():
            if token not in bytes_of:
                bytes_of[token] = bytes([byte_of[character] for character in entry])
        return bytes_of


class IncrementalDecoder:
    """Turns ids that come one after another into text, holding back a character until it is complete.

    What `push` and `finish` return, joined, is `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that became certain with these ids; often empty within an emoji."""
        return self._utf8.decode(b"".join([self._tokenizer.token_bytes(token) for token in ids]))

    def finish(self) -> str:
        """What was held back: empty, or U+FFFD for a character whose end never came."""
        return self._utf8.decode(b"", final=True)


def check_tokenizer_name(name: str) -> None:
    """Refuse what cannot name a tokenizer, before anything is looked for.

    Raises:
        TokenizerError: `tokenizer_name_invalid`.
    """
    if name.startswith("train:"):
        _trained_vocab_size(name)
    elif not _HUB_OR_FOLDER_NAME.fullmatch(name):
        raise TokenizerError(
            "tokenizer_name_invalid",
            f"{name!r} names no tokenizer; give {BUNDLED}, bytes, train:N, or the name of a folder or of a hub "
            "repository: letters, digits and . _ - with at most one slash inside",
        )


def known_vocab_size(name: str) -> int | None:
    """Entries of the tokenizer, without loading it: exact for the bundled one and for bytes; for `train:N` the most it
    can have, since a short text has fewer pairs to merge; None for a folder or a hub name.

    Raises:
        TokenizerError: `tokenizer_name_invalid`.
    """
    check_tokenizer_name(name)
    if name.startswith("train:"):
        return _trained_vocab_size(name)
    return {BUNDLED: BUNDLED_VOCAB_SIZE, "bytes": 256}.get(name)


def load_tokenizer(
    name: str, *, text: str | None = None, allow_hub: bool = False, allowed_folders: Sequence[Path] = ()
) -> Tokenizer:
    """The tokenizer of that name: bundled, trained on `text`, or, where allowed, from a local folder or the hub.

    Args:
        name: `ptbr-8k`, `bytes`, `train:N`, or `folder` or `owner/name`.
        text: what `train:N` learns from; the others ignore it.
        allow_hub: whether a name that is no local folder is fetched from the Hugging Face hub.
        allowed_folders: folders in which the named one is looked for; a symbolic link out of them is refused.

    Raises:
        TokenizerError: `tokenizer_name_invalid`, `tokenizer_not_found`, `hub_not_allowed`, or `tokenizer_unsuitable`
            for one that does not give every text back byte for byte.
    """
    check_tokenizer_name(name)
    if name == BUNDLED:
        return _bundled()
    if name == "bytes":
        return Tokenizer("bytes", _byte_definition())
    if name.startswith("train:"):
        assert text is not None, "train:N needs the text"
        return train_bpe(name, _pieces(text), _trained_vocab_size(name))
    for root in allowed_folders:
        folder = root / name
        if folder.is_dir():
            for path in (folder, *(folder / file for file in _FOREIGN_FILES)):
                if not path.resolve().is_relative_to(root.resolve()):
                    raise TokenizerError("tokenizer_not_found", f"tokenizer {name!r} leads out of the allowed folder")
            return _load_foreign(name, folder)
    if not allow_hub:
        raise TokenizerError(
            "hub_not_allowed",
            f"tokenizer {name!r} is neither built in nor in a folder that may be read, and the Hugging Face hub may "
            "not be asked; set NANOMOE_TOKENIZER_DIR to the folder it lies in, or NANOMOE_ALLOW_HUB=true",
        )
    return _load_foreign(name, _download(name))


def train_bpe(name: str, pieces: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al., arXiv 1508.07909, on bytes as in GPT-2), without special tokens.

    The same pieces give the same bytes. At most `vocab_size` entries: a pair that occurs once is not merged. No token
    crosses from one piece to the next.
    """
    from tokenizers import pre_tokenizers, trainers

    backend = byte_level_bpe()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(pieces, trainer)
    return Tokenizer(name, backend.to_str())


def byte_level_bpe(vocab: Mapping[str, int] | None = None, merges: Sequence[tuple[str, str]] = ()) -> "Backend":
    """A byte-level BPE of these entries and merges, written in GPT-2's alphabet; empty, as `train_bpe` begins, without.

    It splits a text into words before it merges, and gives every text back byte for byte.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE(vocab=dict(vocab), merges=list(merges)) if vocab is not None else models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _trained_vocab_size(name: str) -> int:
    digits = name.removeprefix("train:")
    if not re.fullmatch(r"[1-9][0-9]{2,4}", digits) or int(digits) not in TRAINED_VOCAB_SIZES:
        least, most = TRAINED_VOCAB_SIZES[0], TRAINED_VOCAB_SIZES[-1]
        raise TokenizerError("tokenizer_name_invalid", f"the N of train:N must be {least} to {most}, not {digits!r}")
    return int(digits)


@cache
def _bundled() -> Tokenizer:
    return Tokenizer.load(_ASSETS / BUNDLED)


@cache
def _byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in a `tokenizer.json` (GPT-2's `bytes_to_unicode`)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


@cache
def _byte_definition() -> str:
    """The tokenizer of 256 entries in which each byte is its own id."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    backend = Backend(models.BPE(vocab={c: byte for byte, c in _byte_alphabet().items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend.to_str()


def _pieces(text: str) -> Iterator[str]:
    """`text` in pieces of about `_PIECE_CHARACTERS`: whole, 16 MiB would take gigabytes while they are encoded."""
    start = 0
    while cut := _CUT.search(text, start + _PIECE_CHARACTERS):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _in_batches(pieces: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for piece in pieces:
        batch.append(piece)
        if len(batch) == _PIECES_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _download(name: str) -> Path:
    """The local folder into which the hub's files of a tokenizer were fetched."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_FOREIGN_FILES)))
    except (OSError, ValueError) as error:  # every error of the hub's client is one of the two
        raise TokenizerError("tokenizer_not_found", f"the hub gave no tokenizer {name!r}: {error}") from error


def _load_foreign(name: str, folder: Path) -> Tokenizer:
    """A tokenizer that others made, refused unless any text comes back from it byte for byte."""
    tokenizer = Tokenizer(name, _definition_in(folder, name))
    if reason := _why_unsuitable(tokenizer):
        raise TokenizerError("tokenizer_unsuitable", f"tokenizer {name!r} cannot be used: {reason}")
    return tokenizer


def _definition_in(folder: Path, name: str) -> str:
    """The `tokenizer.json` of a folder; older GPT-2 folders have its content in `vocab.json` and `merges.txt`."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    path, config_path, vocab, merges = [folder / file for file in _FOREIGN_FILES]
    if not path.exists() and not (vocab.exists() and merges.exists()):
        raise TokenizerError(
            "tokenizer_not_found", f"tokenizer {name!r} has neither tokenizer.json nor vocab.json with merges.txt"
        )
    try:
        config = json.loads(config_path.read_bytes()) if config_path.exists() else {}
        if path.exists():
            backend = Backend.from_str(path.read_text(encoding="utf-8"))
        else:
            if config.get("tokenizer_class") not in (None, "GPT2Tokenizer", "GPT2TokenizerFast"):
                raise ValueError(f"vocab.json of a {config['tokenizer_class']}, which is not GPT-2's")
            backend = Backend(models.BPE.from_file(str(vocab), str(merges)))
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.decoder = decoders.ByteLevel()
        if config.get("add_prefix_space"):
            raise ValueError("it puts a space before the text")
    except Exception as error:  # tokenizers raises Exception itself for a file that it cannot read
        raise TokenizerError("tokenizer_unsuitable", f"tokenizer {name!r} cannot be used: {error}") from error
    # A folder may have been saved with a limit on its length; here a text is never cut nor filled up.
    backend.no_truncation()
    backend.no_padding()
    return backend.to_str()


def _why_unsuitable(tokenizer: Tokenizer) -> str | None:
    """Why some text would not come back byte for byte; None for a byte-level BPE, which gives back any."""
    definition: dict[str, Any] = json.loads(tokenizer.definition)
    model, added = definition["model"], definition["added_tokens"]
    if model["type"] != "BPE":
        return f"its model is {model['type']}, not a byte-level BPE"
    if definition["normalizer"]:
        return f"it changes the text before reading it ({definition['normalizer']['type']})"
    if model["dropout"] or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        return "it drops merges at random or marks the parts of words"
    plain = model["vocab"].keys() - {entry["content"] for entry in added}
    if not plain >= set(_byte_alphabet().values()) >= set("".join(plain)):
        return "its entries are not made of the 256 bytes"
    if {*model["vocab"].values(), *(entry["id"] for entry in added)} != set(range(tokenizer.vocab_size)):
        return "its ids have gaps"
    if any(entry["lstrip"] or entry["rstrip"] or _CUT.search(entry["content"]) for entry in added):
        return "an added token of it takes the spaces around it, or holds one"
    splitter = definition["pre_tokenizer"] or {"type": "none"}
    steps = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    kinds = [step["type"] for step in steps]
    if not {*kinds} <= {"ByteLevel", "Split", "Digits"} or kinds[-1:] != ["ByteLevel"]:
        return "it does not split words down to bytes"
    if any(step.get("add_prefix_space") or step.get("behavior") == "Removed" for step in steps):
        return "it adds a space before the text or removes what it splits at"
    if tokenizer._backend.pre_tokenizer.pre_tokenize_str("uma vez")[1:][:1] != [("Ġvez", (3, 7))]:
        return "it does not split before a word's space"
    if tokenizer.decode(tokenizer.encode(_ANY_TEXT)) != _ANY_TEXT:
        return "a text does not come back unchanged"
    return None
