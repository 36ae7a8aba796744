"""How fast prompts are continued: the engine beside nanoGPT's loop and transformers' cached `generate`.

All continue the same prompts from the same weights, those of a short training: before it, logits are nearly equal, and
the engine's short lists longer than they are in use. They take turns, so that a machine whose speed drifts treats all
alike: a figure is the median of the turns, a ratio the median of the ratios within each turn.

Knows no HTTP; `service.cli.bench` measures the same through the service.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanomoe.bench import machine, models, peers
from nanomoe.config import SamplingConfig
from nanomoe.generation.engine import Engine, Request, useful_threads
from nanomoe.model.size import n_active_params

SAMPLINGS = {
    "top_k 1": SamplingConfig(temperature=0.1, top_k=1),
    "top_k 200": SamplingConfig(temperature=0.8, top_k=200),
}
"""The reference run's own, and the defaults of nanoGPT's `sample.py`."""

PROMPT_TOKENS = 10
_MOST_NEW_TOKENS = 80
"""Most new tokens of one text: with the prompt they stay within block_size, so that caches can be used."""

_SLOW_TOKENS = 2560
"""Tokens of a turn in all, about: with more, the peers would take minutes for a large crowd."""

_FIRST_TOKEN_PROMPT = 50
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one number of texts at once, over the turns."""

    sampling: str
    """Which of `SAMPLINGS`."""

    at_once: int
    """Texts that are continued together."""

    new_tokens: int
    """New tokens of each text."""

    tok_per_sec: dict[str, float]
    """In all, by who did it: the median."""

    ratio: dict[str, float]
    """The engine's tokens a second over each peer's: the median of the turns' ratios."""


@dataclass(frozen=True)
class Figures:
    """What was measured of one model."""

    model: str
    vocab_size: int
    n_active_params: int
    numerics: str
    """How the engine computes a token, in words."""

    first_token_seconds: dict[str, float]
    """From a prompt of 50 tokens to the first new one, by who did it."""

    speeds: list[Speed]
    limit_tok_per_sec: float
    """A single text's, if nothing but reading the active weights as float32 took time."""

    limit_as_stored_tok_per_sec: float
    """The same, with the output layer read as the engine stores it."""

    read_bytes_per_sec: float
    """At which this machine reads that many bytes again and again."""


def measure(
    name: str,
    vocab_size: int,
    *,
    device: torch.device = _CPU,
    at_once: tuple[int, ...] = (1, 8, 32, 128),
    turns: int = 5,
    with_transformers: bool = True,
    said: Callable[[str], None] = lambda _: None,
) -> Figures:
    """Measure one of `models.MODELS`. `said` is told what is being measured."""
    model = models.trained(name, models.tokenizer_of(vocab_size)).to(device)
    engine = Engine(model.state_dict(), model.config, device=device, max_running=max(at_once), compiled=True)
    contenders: dict[str, peers.Continue] = {"nanomoe": _by_engine(engine), "nanogpt": peers.nanogpt(model)}
    if with_transformers:
        contenders["transformers"] = peers.transformers_cached(model)
    speeds = []
    for sampling in SAMPLINGS:
        for n in at_once:
            said(f"{name}, {vocab_size:,} entries, {sampling}, {n} at once")
            speeds.append(_race(contenders, vocab_size, sampling, n, turns, device))
    said(f"{name}, {vocab_size:,} entries, the first token")
    first = _first_token_seconds(contenders, vocab_size, device)
    n_active = n_active_params(model.config, vocab_size) - model.config.block_size * model.config.n_embd
    stored = 4 * (n_active - vocab_size * model.config.n_embd) + engine.output_bytes_per_token
    bandwidth, bandwidth_as_stored = (machine.read_bandwidth(n_bytes, device) for n_bytes in (4 * n_active, stored))
    return Figures(
        model=name,
        vocab_size=vocab_size,
        n_active_params=n_active,
        numerics=engine.numerics,
        first_token_seconds=first,
        speeds=speeds,
        limit_tok_per_sec=bandwidth / (4 * n_active),
        limit_as_stored_tok_per_sec=bandwidth_as_stored / stored,
        read_bytes_per_sec=bandwidth,
    )


def _by_engine(engine: Engine) -> peers.Continue:
    n_threads = torch.get_num_threads()

    def extend(tokens_NT: Tensor, max_new_tokens: int, sampling: SamplingConfig) -> Tensor:
        torch.set_num_threads(useful_threads(len(tokens_NT), n_threads))
        try:
            made = engine.run(
                [Request(prompt, max_new_tokens, sampling, seed) for seed, prompt in enumerate(tokens_NT.tolist())]
            )
        finally:
            torch.set_num_threads(n_threads)
        return torch.tensor([continuation.tokens for continuation in made])

    return extend


def _race(
    contenders: dict[str, peers.Continue], vocab_size: int, sampling: str, n: int, turns: int, device: torch.device
) -> Speed:
    new_tokens = max(8, min(_MOST_NEW_TOKENS, _SLOW_TOKENS // n))
    for extend in contenders.values():
        extend(_prompts(vocab_size, n, PROMPT_TOKENS, turns).to(device), 2, SAMPLINGS[sampling])
    rounds = []
    for turn in range(turns):
        prompts = _prompts(vocab_size, n, PROMPT_TOKENS, turn).to(device)
        seconds = {
            who: _seconds(extend, prompts, new_tokens, SAMPLINGS[sampling]) for who, extend in contenders.items()
        }
        rounds.append({who: n * new_tokens / taken for who, taken in seconds.items()})
    return Speed(
        sampling=sampling,
        at_once=n,
        new_tokens=new_tokens,
        tok_per_sec={who: statistics.median(each[who] for each in rounds) for who in contenders},
        ratio={
            who: statistics.median(each["nanomoe"] / each[who] for each in rounds)
            for who in contenders
            if who != "nanomoe"
        },
    )


def _seconds(extend: peers.Continue, prompts_NT: Tensor, new_tokens: int, sampling: SamplingConfig) -> float:
    began = time.perf_counter()
    made_NT = extend(prompts_NT, new_tokens, sampling)
    machine.synchronize(prompts_NT.device)
    seconds = time.perf_counter() - began
    assert made_NT.shape == (len(prompts_NT), prompts_NT.shape[1] + new_tokens), "all did all of the work"
    return seconds


def _first_token_seconds(
    contenders: dict[str, peers.Continue], vocab_size: int, device: torch.device
) -> dict[str, float]:
    """The median of nine prompts, which the contenders take in turns; a first one warms them up."""
    turns = []
    for turn in range(10):
        prompt = _prompts(vocab_size, 1, _FIRST_TOKEN_PROMPT, turn).to(device)
        turns.append({who: _seconds(extend, prompt, 1, SAMPLINGS["top_k 200"]) for who, extend in contenders.items()})
    return {who: statistics.median(seconds[who] for seconds in turns[1:]) for who in contenders}


def _prompts(vocab_size: int, n: int, length: int, seed: int) -> Tensor:
    return torch.randint(vocab_size, (n, length), generator=torch.Generator().manual_seed(seed))
