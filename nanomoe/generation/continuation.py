"""One text continued by a model that is still in training, for which nothing has been prepared.

A short one is drafted: the model reads the text with guesses for all that is still to come, in one pass, keeps every
guess that it would have chosen itself, and its own choice in place of the first other one (speculative decoding,
Leviathan et al., arXiv 2211.17192). Two guesses are read together, neither of which costs a model: that the last token
repeats, as a model begins with, and what it chose itself in the pass before (Jacobi decoding, Santilli et al., arXiv
2305.10427), at first what is expected. A pass over 35 tokens takes little longer than one over a single token, and two
to five passes do where 25 tokens were computed one by one (measured on the reference run).

Shape letters: G guesses, T tokens, N positions whose next token is not certain yet, C channels.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nanomoe.config import SamplingConfig
from nanomoe.generation import sampling
from nanomoe.generation.device_sampling import choose_all
from nanomoe.generation.engine import Engine, Request
from nanomoe.generation.sampling import Candidates
from nanomoe.model.gpt import GPT

MOST_DRAFTED = 96
"""Tokens of prompt and continuation beyond which each new token is computed from cached keys and values: every pass of
a draft reads all of them again. Assumed."""


def continue_tokens(
    model: GPT,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    how: SamplingConfig,
    seed: int,
    expected: Sequence[int] = (),
    before_pass: Callable[[], None] = lambda: None,
) -> list[int]:
    """The new tokens that a model in evaluation mode adds to one prompt, at its present weights.

    `expected`: what may come next; it decides how long this takes. `before_pass` is called before each pass of the
    model; it may raise.

    Raises:
        ValueError: the prompt is empty, or a logit overflows float32.
    """
    if max_new_tokens == 0:
        return []
    request = Request(prompt, max_new_tokens, how, seed)
    if len(prompt) + max_new_tokens <= min(MOST_DRAFTED, model.config.block_size):
        return _drafted(model, request, expected, before_pass)
    weights = model.state_dict()
    engine = Engine(weights, model.config, device=weights["transformer.wte.weight"].device, max_running=1)
    continuation = engine.submit(request)
    while not continuation.finished:
        before_pass()
        engine.step()
    return continuation.new


@torch.inference_mode()
def _drafted(model: GPT, request: Request, expected: Sequence[int], before_pass: Callable[[], None]) -> list[int]:
    draft = Draft(request, expected)
    while draft.n_left:
        before_pass()
        tokens_GT = torch.tensor(draft.guesses(), device=model.transformer.wte.weight.device)
        hidden_GTC, _ = model.hidden(tokens_GT)
        logits_GNV = model.logits(hidden_GTC[:, -draft.n_left :])
        (chosen,) = choices([draft], [logits_GNV])
        draft.take(chosen)
    return draft.new


class Draft:
    """A continuation under way."""

    N_GUESSES = 2

    def __init__(self, request: Request, expected: Sequence[int]) -> None:
        stream = sampling.uniform_stream(request.seed, request.index)
        self._uniforms = [stream.random() for _ in range(request.max_new_tokens)]
        self._request = request
        self._certain = list(request.prompt)
        self._guess = list(expected[: request.max_new_tokens])

    @property
    def n_left(self) -> int:
        """New tokens that are not certain yet."""
        return len(self._request.prompt) + self._request.max_new_tokens - len(self._certain)

    @property
    def new(self) -> list[int]:
        """The new tokens so far."""
        return self._certain[len(self._request.prompt) :]

    @property
    def how(self) -> SamplingConfig:
        """How the next token is chosen."""
        return self._request.sampling

    @property
    def uniforms(self) -> list[float]:
        """The uniform number of each position whose token is not certain yet."""
        return self._uniforms[-self.n_left :]

    def guesses(self) -> list[list[int]]:
        """What the model is to read next: (`N_GUESSES`, T) tokens, T the same in each pass. The hidden states of the
        last `n_left` tell the tokens that are not certain yet."""
        # What comes after the last token of all is not asked.
        return [[*self._certain, *guess[:-1]] for guess in self._guessed()]

    def take(self, chosen: list[list[int]]) -> None:
        """Go on with what the model has chosen at the last `n_left` positions of each guess: a choice is certain if all
        guesses before it were right."""
        n_certain = [1 + _n_equal(each, own[:-1]) for each, own in zip(self._guessed(), chosen, strict=True)]
        best = max(range(len(chosen)), key=n_certain.__getitem__)
        self._certain += chosen[best][: n_certain[best]]
        self._guess = chosen[0][n_certain[best] :]

    def _guessed(self) -> list[list[int]]:
        repeated = [self._certain[-1]] * self.n_left
        return [[*self._guess, *repeated[len(self._guess) :]], repeated]


def choices(drafts: Sequence[Draft], logits: Sequence[Tensor]) -> list[list[list[int]]]:
    """The next token at each uncertain position of each guess of each draft, chosen where the logits are: those of a
    draft are (G, N, V), N its `n_left`.

    Raises:
        ValueError: a logit overflows float32.
    """
    logits_RV = torch.cat([each.flatten(0, 1) for each in logits])
    hows = [draft.how for draft in drafts for _ in range(Draft.N_GUESSES * draft.n_left)]
    uniforms = [uniform for draft in drafts for _ in range(Draft.N_GUESSES) for uniform in draft.uniforms]
    if logits_RV.is_cuda:
        tokens = iter(choose_all(logits_RV, hows, uniforms))
    else:
        rows = zip(logits_RV.numpy(), hows, uniforms, strict=True)
        tokens = iter([sampling.choose(Candidates(logits_V), how, uniform) for logits_V, how, uniform in rows])
    return [[[next(tokens) for _ in range(draft.n_left)] for _ in range(Draft.N_GUESSES)] for draft in drafts]


def _n_equal(some: Sequence[int], others: Sequence[int]) -> int:
    """How many of the first are equal."""
    return next((n for n, (one, other) in enumerate(zip(some, others, strict=False)) if one != other), len(others))
