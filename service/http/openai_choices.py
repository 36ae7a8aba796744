"""Continuations in the shape of OpenAI's completions: tokens by name, with their offsets in the text.

Knows no HTTP and no request.
"""

import codecs
from collections.abc import Sequence

from service.generation.messages import Chunk, LogProbsWithBytes, PromptTokenLogProbs
from service.http import schemas


class ChoiceWriter:
    """Converts the chunks of one continuation."""

    def __init__(self, index: int, prompt: str = "", prompt_tokens: Sequence[PromptTokenLogProbs] = ()) -> None:
        """`prompt`: echoed at the start of the text, empty for no echo; `prompt_tokens`: its tokens, where
        log-probabilities are requested."""
        self._index = index
        self._prompt = prompt
        self._prompt_tokens = prompt_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._n_characters = 0

    def write(self, chunk: Chunk) -> schemas.CompletionChoice:
        """The choice for the next chunk; the first begins with the echoed prompt."""
        prompt, self._prompt = self._prompt, ""
        return schemas.CompletionChoice(
            index=self._index,
            text=prompt + chunk.text,
            logprobs=None if chunk.logprobs is None else self._of_tokens(chunk.logprobs),
            finish_reason=chunk.finish_reason,
        )

    def _of_tokens(self, new: Sequence[LogProbsWithBytes]) -> schemas.CompletionLogprobs:
        prompt, self._prompt_tokens = self._prompt_tokens, ()
        offsets = [self._offset(token.utf8) for token in prompt]
        if prompt:  # prompt and continuation are decoded apart
            self._n_characters += len(self._decoder.decode(b"", final=True))
        offsets += [self._offset(one.chosen.utf8) for one in new]
        utf8 = [token.utf8 for token in prompt] + [one.chosen.utf8 for one in new]
        logprobs = [*(token.logprobs for token in prompt), *new]
        return schemas.CompletionLogprobs(
            tokens=[token_name(one) for one in utf8],
            token_logprobs=[None if one is None else one.chosen.logprob for one in logprobs],
            top_logprobs=[None if one is None else _by_name(one) for one in logprobs],
            text_offset=offsets,
        )

    def _offset(self, utf8: str) -> int:
        """Offset of a token: the number of characters that the tokens before it complete."""
        offset = self._n_characters
        self._n_characters += len(self._decoder.decode(bytes.fromhex(utf8)))
        return offset


def text_of(tokens: Sequence[PromptTokenLogProbs]) -> str:
    """The text of a prompt's tokens; U+FFFD where they split a character."""
    return b"".join(bytes.fromhex(token.utf8) for token in tokens).decode(errors="replace")


def _by_name(probable: LogProbsWithBytes) -> dict[str, float]:
    return {token_name(token.utf8): token.logprob for token in (*probable.likeliest, probable.chosen)}


def token_name(utf8: str) -> str:
    r"""The text of a token, given its bytes in hexadecimal; for one that splits a character `bytes:\xc3`, so that no
    two tokens have one name."""
    given = bytes.fromhex(utf8)
    try:
        return given.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in given)
