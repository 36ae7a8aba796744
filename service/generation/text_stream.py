"""The text of tokens that come one after another, as far as it is certain.

Two things are held back: a character until all of its bytes have come, and the end of a text that may begin a stop
string. Knows no engine and no HTTP.
"""

from collections.abc import Iterable, Sequence

from nanomoe.tokenizer import IncrementalDecoder, Tokenizer


class TextStream:
    """The text of one continuation."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """`stop`: strings, not empty; the text ends before the first that is complete."""
        self._decoder = IncrementalDecoder(tokenizer)
        self._stop = stop
        self._held = ""
        self._starts: list[int] = []
        """Where each token begins in the text, in characters."""
        self._n_characters = 0
        """Characters that are complete."""
        self._n_certain = 0
        """Complete characters that were returned."""
        self.n_begun = 0
        """How many of the pushed tokens, from the first on, have their first character in the returned text; the text
        of the others is still held back, and a stop string may cut it off."""
        self.stopped = False
        """Whether a stop string was found; what is pushed after it has no text."""

    @property
    def has_stops(self) -> bool:
        """Whether a string may end the text."""
        return bool(self._stop)

    def push(self, ids: Iterable[int]) -> str:
        """The text that became certain with these ids."""
        new = ""
        for token in ids:
            self._starts.append(self._n_characters + len(new))
            new += self._decoder.push([token])
        return self._certain(new)

    def finish(self) -> str:
        """What was held back, now that nothing follows; an incomplete character becomes U+FFFD."""
        text = self._certain(self._decoder.finish())
        if self.stopped:
            return text
        held, self._held = self._held, ""
        return text + self._returned(held)

    def _certain(self, new: str) -> str:
        self._n_characters += len(new)
        if self.stopped:
            return ""
        text = self._held + new
        # The one that is complete first, so that it does not matter how many tokens come at once.
        found = min(((at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            self.stopped = True
            return self._returned(text[: found[1]])
        n_held = next((n for n in range(self._longest_held(text), 0, -1) if self._may_begin(text[-n:])), 0)
        self._held = text[len(text) - n_held :]
        return self._returned(text[: len(text) - n_held])

    def _returned(self, text: str) -> str:
        self._n_certain += len(text)
        while self.n_begun < len(self._starts) and self._starts[self.n_begun] < self._n_certain:
            self.n_begun += 1
        return text

    def _longest_held(self, text: str) -> int:
        return min(len(text), max((len(stop) for stop in self._stop), default=1) - 1)

    def _may_begin(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stop)
