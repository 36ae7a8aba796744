"""Token ids as the engine's messages describe them: with their text, their bytes and their log-probability.

Knows no model.
"""

import math
from collections.abc import Sequence

from nanomoe.generation import logprobs
from nanomoe.tokenizer import Tokenizer
from service.generation.answers import PromptToken
from service.generation.messages import LogProbsWithBytes, Refused, TokenBytesLogProb


def prompt_tokens(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[PromptToken]:
    """The tokens of a text, and where each begins in it."""
    described = []
    byte_offset = 0
    for token in tokens:
        described.append(PromptToken(token=token, text=tokenizer.decode([token]), byte_offset=byte_offset))
        byte_offset += len(tokenizer.token_bytes(token))
    return described


def describe_logprobs(tokenizer: Tokenizer, found: logprobs.LogProbs) -> LogProbsWithBytes | None:
    """The log-probabilities in the place of a token; None where its own is not finite."""
    if not math.isfinite(found.chosen.logprob):
        return None
    likeliest = tuple(_log_prob(tokenizer, one) for one in found.likeliest if math.isfinite(one.logprob))
    return LogProbsWithBytes(chosen=_log_prob(tokenizer, found.chosen), likeliest=likeliest)


def _log_prob(tokenizer: Tokenizer, found: logprobs.TokenLogProb) -> TokenBytesLogProb:
    text, utf8 = tokenizer.decode([found.token]), tokenizer.token_bytes(found.token).hex()
    return TokenBytesLogProb(token=found.token, text=text, utf8=utf8, logprob=found.logprob)


def refuse_unknown_token(
    request_id: int, prompt: str | Sequence[int], tokenizer: Tokenizer, *place: int
) -> Refused | None:
    """The refusal of a prompt with a token id outside of the vocabulary; None for any other prompt. `place`: the
    prompt's number, where a request has several."""
    if isinstance(prompt, str):
        return None
    size = tokenizer.vocab_size
    n = next((n for n, token in enumerate(prompt) if not 0 <= token < size), None)
    if n is None:
        return None
    message = f"token {prompt[n]} is not in the model's vocabulary, whose ids are 0 to {size - 1}"
    return Refused(id=request_id, code="token_unknown", message=message, place=(*place, n))
