"""One text continued by a model that is still in training, for which nothing has been prepared.

A short one is drafted: the model reads the text with guesses for all that is still to come, in one pass, keeps every
guess that it would have chosen itself, and its own choice in place of the first other one (speculative decoding,
Leviathan et al., arXiv 2211.17192). Two guesses are read together, neither of which costs a model: that the last token
repeats, as a model begins with, and what it chose itself in the pass before (Jacobi decoding, Santilli et al., arXiv
2305.10427), at first what is expected. A pass over 35 tokens takes little longer than one over a single token, and two
to five passes do where 25 tokens were computed one by one (measured on the reference run).

Shape letters: G guesses, T tokens, C channels, R rows of logits, V vocabulary.
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
    while n_left := draft.n_left:
        before_pass()
        tokens_GT = torch.tensor(draft.guesses(), device=model.transformer.wte.weight.device)
        hidden_GTC, _ = model.hidden(tokens_GT)
        logits_RV = model.logits(hidden_GTC[:, -n_left:]).flatten(0, 1)
        uniforms = draft.uniforms[-n_left:] * Draft.N_GUESSES
        chosen = choose_rows(logits_RV, [request.sampling] * len(uniforms), uniforms)
        draft.take([chosen[:n_left], chosen[n_left:]])
    return draft.new


class Draft:
    """A continuation under way."""

    N_GUESSES = 2

    def __init__(self, request: Request, expected: Sequence[int]) -> None:
        stream = sampling.uniform_stream(request.seed, request.index)
        self.sampling = request.sampling
        """How new tokens are chosen."""
        self.uniforms = [stream.random() for _ in range(request.max_new_tokens)]
        """The uniform number of each new token."""
        self._n_prompt = len(request.prompt)
        self._certain = list(request.prompt)
        self._guess = list(expected[: request.max_new_tokens])

    @property
    def n_left(self) -> int:
        """New tokens that are not certain yet."""
        return self._n_prompt + len(self.uniforms) - len(self._certain)

    @property
    def new(self) -> list[int]:
        """The new tokens that are certain."""
        return self._certain[self._n_prompt :]

    def guesses(self) -> list[list[int]]:
        """What the model is to read next, as long as a token is left: (`N_GUESSES`, T) tokens, T the same in each pass.
        The hidden states of the last `n_left` tell the tokens that are not certain yet."""
        # What comes after the last token of all is not asked.
        return [[*self._certain, *guess[:-1]] for guess in self._guessed()]

    def take(self, chosen: Sequence[Sequence[int]]) -> None:
        """Go on with what the model has chosen at the last `n_left` positions of each guess: a choice is certain if all
        guesses before it were right."""
        n_certain = [1 + _n_equal(guess, own[:-1]) for guess, own in zip(self._guessed(), chosen, strict=True)]
        best = max(range(len(chosen)), key=n_certain.__getitem__)
        self._certain += chosen[best][: n_certain[best]]
        self._guess = list(chosen[0][n_certain[best] :])

    def _guessed(self) -> list[list[int]]:
        repeated = [self._certain[-1]] * self.n_left
        return [[*self._guess, *repeated[len(self._guess) :]], repeated]


def choose_rows(logits_RV: Tensor, samplings: Sequence[SamplingConfig], uniforms: Sequence[float]) -> list[int]:
    """The next token of each row, chosen where the logits are.

    Raises:
        ValueError: the largest logit of some row is not a finite number.
    """
    if logits_RV.is_cuda:
        return choose_all(logits_RV, samplings, uniforms)
    rows = zip(logits_RV.numpy(), samplings, uniforms, strict=True)
    return [sampling.choose(Candidates(logits_V), how, uniform) for logits_V, how, uniform in rows]


def _n_equal(some: Sequence[int], others: Sequence[int]) -> int:
    """How many of the first are equal."""
    return next((n for n, (one, other) in enumerate(zip(some, others, strict=False)) if one != other), len(others))
