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
    device = model.transformer.wte.weight.device
    stream = sampling.uniform_stream(request.seed, request.index)
    uniforms = [stream.random() for _ in range(request.max_new_tokens)]
    certain = list(request.prompt)
    total = len(certain) + request.max_new_tokens
    guess = list(expected[: request.max_new_tokens])
    while len(certain) < total:
        before_pass()
        n_left = total - len(certain)
        repeated = [certain[-1]] * n_left
        guesses = [[*guess, *repeated[len(guess) :]], repeated]
        # What comes after the last token of all is not asked.
        tokens_GT = torch.tensor([[*certain, *each[:-1]] for each in guesses], device=device)
        hidden_GTC, _ = model.hidden(tokens_GT)
        logits_GNV = model.logits(hidden_GTC[:, -n_left:])
        chosen = _choices(logits_GNV, request.sampling, uniforms[-n_left:])
        # A choice is certain if all guesses before it were right.
        n_certain = [1 + _n_equal(each, choices[:-1]) for each, choices in zip(guesses, chosen, strict=True)]
        best = max(range(len(guesses)), key=n_certain.__getitem__)
        certain += chosen[best][: n_certain[best]]
        guess = chosen[0][n_certain[best] :]
    return certain[len(request.prompt) :]


def _choices(logits_GNV: Tensor, how: SamplingConfig, uniforms: Sequence[float]) -> list[list[int]]:
    """The next token at each position of each guess, chosen where the logits are."""
    n_guesses, n_positions, _ = logits_GNV.shape
    logits, uniforms = logits_GNV.flatten(0, 1), [*uniforms] * n_guesses
    if logits.is_cuda:
        tokens = choose_all(logits, [how] * len(uniforms), uniforms)
    else:
        rows = zip(logits.numpy(), uniforms, strict=True)
        tokens = [sampling.choose(Candidates(logits_V), how, uniform) for logits_V, uniform in rows]
    return [tokens[n : n + n_positions] for n in range(0, len(tokens), n_positions)]


def _n_equal(some: Sequence[int], others: Sequence[int]) -> int:
    """How many of the first are equal."""
    return next((n for n, (one, other) in enumerate(zip(some, others, strict=False)) if one != other), len(others))
