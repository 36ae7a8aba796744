"""A continuation as OpenAI's completions write it: tokens by name, and where each begins in the text.

Knows no HTTP and no request.
"""

import codecs

from service import schemas
from service.engine_messages import Chunk, LogProbs, TokenLogProb


class ChoiceWriter:
    """One continuation, chunk by chunk."""

    def __init__(self, index: int, prompt: str) -> None:
        """`prompt`: what the text begins with, empty for nothing."""
        self._index = index
        self._prompt = prompt
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._n_characters = 0

    def write(self, chunk: Chunk) -> schemas.CompletionChoice:
        """The next piece."""
        prompt, self._prompt = self._prompt, ""
        return schemas.CompletionChoice(
            index=self._index,
            text=prompt + chunk.text,
            logprobs=self._of_tokens(chunk.logprobs),
            finish_reason=chunk.finish_reason,
        )

    def _of_tokens(self, given: tuple[LogProbs, ...] | None) -> schemas.CompletionLogprobs | None:
        if given is None:
            return None
        return schemas.CompletionLogprobs(
            tokens=[token_name(one.chosen) for one in given],
            token_logprobs=[one.chosen.logprob for one in given],
            top_logprobs=[
                {token_name(token): token.logprob for token in (*one.likeliest, one.chosen)} for one in given
            ],
            text_offset=[self._offset(one.chosen) for one in given],
        )

    def _offset(self, token: TokenLogProb) -> int:
        """Where a token begins: after the characters that the tokens before it have made whole."""
        offset = self._n_characters
        self._n_characters += len(self._decoder.decode(bytes.fromhex(token.utf8)))
        return offset


def token_name(token: TokenLogProb) -> str:
    r"""A token's text; `bytes:\xc3` for one that splits a character, so that no two tokens have one name."""
    utf8 = bytes.fromhex(token.utf8)
    try:
        return utf8.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in utf8)
