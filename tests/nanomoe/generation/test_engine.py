"""Texts beside those of `generate_reference`, a plain float32 loop over the model itself, and beside themselves in
other company."""

import gc
import math
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from nanomoe import cuda_graphs
from nanomoe.config import SamplingConfig
from nanomoe.cuda_graphs import CudaGraphs
from nanomoe.generation import sampling
from nanomoe.generation.decoder import TensorDecoder
from nanomoe.generation.engine import Continuation, Engine, Request, generate_reference
from nanomoe.generation.graphs import TOKENS_AT_ONCE, TokenGraphs
from nanomoe.generation.output_layer import TensorOutputLayer
from nanomoe.generation.sampling import Candidates
from nanomoe.model import moe
from nanomoe.model.gpt import GPT
from tests.nanomoe.generation.models import BLOCK_SIZE, CONFIGS, random_model
from tests.nanomoe.training.steps.graphs_stand_in import RecordedGraphs

GREEDY = SamplingConfig(temperature=0)
MIXED = [
    GREEDY,
    SamplingConfig(),
    SamplingConfig(temperature=0.7, top_k=5),
    SamplingConfig(top_p=0.8),
    SamplingConfig(temperature=0.9, top_k=30, top_p=0.9),
    SamplingConfig(temperature=2.0, top_k=1),
]
both_ways = pytest.mark.parametrize("compiled", [False, True], ids=["tensors", "loops"])


def _engine(model: GPT, **options: Any) -> Engine:
    return Engine(model.state_dict(), model.config, **options)


def _requests(
    n: int, vocab_size: int, samplings: Sequence[SamplingConfig], *, longest: int = 2 * BLOCK_SIZE
) -> list[Request]:
    chance = random.Random(0)  # noqa: S311
    return [
        Request(
            prompt=[chance.randrange(vocab_size) for _ in range(chance.randint(1, longest))],
            max_new_tokens=chance.randint(1, longest),
            sampling=samplings[n % len(samplings)],
            seed=n,
        )
        for n in range(n)
    ]


def _texts(continuations: Sequence[Continuation]) -> list[list[int]]:
    return [continuation.new for continuation in continuations]


def _assert_texts_of_reference(model: GPT, made: Sequence[Continuation]) -> None:
    """Each text is that of the reference; two float32 computations may part where tokens are too close to call."""
    n_parted = 0
    for continuation in made:
        request = continuation.request
        expected = generate_reference(model.state_dict(), model.config, request)
        if continuation.new == expected:
            continue
        n_parted += 1
        at = next(n for n, (ours, theirs) in enumerate(zip(continuation.new, expected, strict=True)) if ours != theirs)
        tokens = [*request.prompt, *expected[:at]][-model.config.block_size :]
        wide = GPT(model.config, model.vocab_size).double().eval()
        wide.load_state_dict(model.state_dict())
        with torch.no_grad():
            logits_V = wide(torch.tensor([tokens])).logits_BTV[0, -1].numpy()
        if request.sampling.greedy:
            assert logits_V.max() - logits_V[continuation.new[at]] < 1e-4
        else:
            uniform = sampling.uniform_stream(request.seed, request.index).random(at + 1)[at]
            nearby = np.clip([uniform - 1e-4, uniform, uniform + 1e-4], 0, 1 - 1e-9).tolist()
            assert continuation.new[at] in {
                sampling.choose(Candidates(logits_V), request.sampling, one) for one in nearby
            }
    assert n_parted <= len(made) // 10


@both_ways
@pytest.mark.parametrize("name", CONFIGS)
def test_texts_equal_those_of_the_uncached_loop(name: str, compiled: bool) -> None:
    model = random_model(**CONFIGS[name])
    requests = _requests(24, 97, [GREEDY, *MIXED])
    _assert_texts_of_reference(model, _engine(model, compiled=compiled).run(requests))


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_two_hundred_greedy_texts_equal_those_of_the_uncached_loop(name: str) -> None:
    model = random_model(vocab_size=300, **CONFIGS[name])
    made = _engine(model, compiled=True).run(_requests(200, 300, [GREEDY], longest=BLOCK_SIZE + 6))
    _assert_texts_of_reference(model, made)
    assert sum(continuation.window_slid for continuation in made) > 50


def _served_among_others(engine: Engine, requests: Sequence[Request], n: int) -> list[list[int]]:
    """The texts of the first `n` requests, which join one after another; some of the others are cancelled."""
    chance = random.Random(1)  # noqa: S311
    continuations: list[Continuation] = []
    for request in requests:
        continuations.append(engine.submit(request))
        for _ in range(chance.randrange(4)):
            engine.step()
        if len(continuations) > n + 5 and chance.random() < 0.3:
            engine.cancel(continuations[chance.randrange(n, len(continuations))])
    while not all(continuation.finished for continuation in continuations):
        engine.step()
    return _texts(continuations[:n])


@cache
def _texts_alone(name: str, compiled: bool) -> list[list[int]]:
    """Each text from an engine that serves nobody else, with the threads that there are at the first call."""
    model = random_model(vocab_size=700, **CONFIGS[name])
    return [_engine(model, compiled=compiled).run([one])[0].new for one in _requests(40, 700, MIXED)[:15]]


@both_ways
@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("name", ["dense", "wide", "moe", "moe, every option"])
def test_a_text_does_not_depend_on_who_else_is_served(name: str, n_threads: int, compiled: bool) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        crowded = _engine(random_model(vocab_size=700, **CONFIGS[name]), max_running=17, compiled=compiled)
        assert _served_among_others(crowded, _requests(40, 700, MIXED), 15) == _texts_alone(name, compiled)
    finally:
        torch.set_num_threads(before)


def _in_one_shape(model: GPT, max_running: int) -> Engine:
    """An engine that computes as on a GPU, but on the CPU and without a graph."""
    engine = _engine(model, max_running=max_running)
    weights = model.state_dict()
    engine._decoder = TensorDecoder(weights, model.config, torch.device("cpu"), max_running, in_one_shape=True)
    assert isinstance(engine._output, TensorOutputLayer)
    engine._chosen_on_device = engine._output
    return engine


def _captured(model: GPT, max_running: int) -> Engine:
    """An engine that works as on a GPU, with what stands in for its graphs."""
    engine = _in_one_shape(model, max_running)
    assert isinstance(engine._decoder, TensorDecoder)
    assert isinstance(engine._output, TensorOutputLayer)
    graphs = RecordedGraphs(torch.device("cpu"))
    engine._token_graphs = TokenGraphs(engine._decoder, engine._output, graphs)
    return engine


@pytest.mark.parametrize("name", ["dense", "moe", "moe, every option"])
def test_what_fills_up_the_one_shape_of_a_gpu_does_not_change_a_text(name: str) -> None:
    model = random_model(vocab_size=300, **CONFIGS[name])
    requests = _requests(30, 300, MIXED)
    alone = _in_one_shape(model, 9).run(requests[:1]) + [_in_one_shape(model, 9).run([one])[0] for one in requests[1:9]]
    assert _served_among_others(_in_one_shape(model, 9), requests, 9) == _texts(alone)
    _assert_texts_of_reference(model, alone)


@pytest.mark.parametrize("name", ["dense", "moe, every option"])
def test_texts_of_which_a_replay_adds_several_tokens_equal_those_made_token_by_token(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long and short ones, some of one token, some whose window slides, some of which nobody may add two."""
    monkeypatch.setattr(moe, "choose_expert_path", lambda *_: ("masked", "as on a GPU"))
    model = random_model(vocab_size=300, **CONFIGS[name])
    requests = [
        replace(request, may_end_early=n % 7 == 3, logprobs=2 if n % 11 == 5 else None)
        for n, request in enumerate([*_requests(18, 300, MIXED), Request([7], 9, seed=50)])
    ]
    expected = _in_one_shape(model, 9).run(requests)
    ours = _captured(model, 9).run(requests)
    assert _texts(ours) == _texts(expected)
    assert [one.logprobs for one in ours] == [one.logprobs for one in expected]
    assert [one.window_slid for one in ours] == [one.window_slid for one in expected]
    crowded = _captured(model, 9)
    assert _served_among_others(crowded, requests, 9) == _texts(expected[:9])


def test_a_replay_adds_several_tokens_unless_one_of_them_may_be_the_last() -> None:
    engine = _captured(random_model(), 3)
    long = engine.submit(Request([1, 2], 20, GREEDY))
    engine.step()
    assert len(long.new) == 1  # a prompt is read for its first token
    engine.step()
    assert len(long.new) == 1 + TOKENS_AT_ONCE
    looked_at = engine.submit(Request([3, 4], 20, GREEDY, may_end_early=True))
    for n in range(1, 4):
        engine.step()
        assert len(looked_at.new) == n


def test_programs_are_captured_once_for_each_kind_of_choice() -> None:
    engine = _captured(random_model(), 3)
    graphs = engine._token_graphs
    assert graphs is not None

    def n_captured(*samplings: SamplingConfig) -> int:
        before = len(graphs._programs)
        engine.run([Request([1, 2], 6, how, seed=n) for n, how in enumerate(samplings)])
        return len(graphs._programs) - before

    assert n_captured(GREEDY) == 1
    assert n_captured(GREEDY, SamplingConfig(top_k=1)) == 0
    assert n_captured(SamplingConfig(top_k=30), GREEDY) == 1
    assert n_captured(SamplingConfig(top_k=20), SamplingConfig(top_k=32, temperature=0.3)) == 0
    assert n_captured(SamplingConfig(top_p=0.9)) == 1


@both_ways
def test_logprobs_are_those_of_the_models_own_softmax(compiled: bool) -> None:
    model = random_model(**CONFIGS["moe"])
    engine = _engine(model, compiled=compiled)
    how = SamplingConfig(temperature=0.5, top_k=10)
    continuation = engine.run([Request([5, 6, 7], 30, how, seed=1, logprobs=3)])[0]
    tokens = continuation.tokens
    assert len(continuation.logprobs) == 30
    for n, found in enumerate(continuation.logprobs):
        window_BT = torch.tensor([tokens[: 3 + n][-BLOCK_SIZE:]])
        with torch.no_grad():
            expected = model.double()(window_BT).logits_BTV[0, -1].log_softmax(-1)
        assert found.chosen.token == tokens[3 + n]
        assert math.isclose(found.chosen.logprob, expected[tokens[3 + n]].item(), abs_tol=1e-4)
        assert [one.token for one in found.likeliest] == expected.topk(3).indices.tolist()
    silent = engine.run([Request([5, 6, 7], 30, how, seed=1)])[0]
    assert silent.new == continuation.new
    assert silent.logprobs == []


def test_tokens_chosen_on_a_device_have_the_same_logprobs() -> None:
    model = random_model()
    requests = [Request([5, 6, n], 6, MIXED[n % len(MIXED)], seed=n, logprobs=n % 3 or None) for n in range(8)]
    ours, theirs = (engine.run(requests) for engine in (_in_one_shape(model, 9), _engine(model)))
    assert _texts(ours) == _texts(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert len(one.logprobs) == len(other.logprobs)
        for mine, its in zip(one.logprobs, other.logprobs, strict=True):
            assert [like.token for like in mine.likeliest] == [like.token for like in its.likeliest]
            assert math.isclose(mine.chosen.logprob, its.chosen.logprob, abs_tol=1e-4)


def test_window_slid_tells_whether_a_token_was_chosen_without_the_oldest_ones() -> None:
    engine = _engine(random_model())

    def slid(n_prompt: int, n_new: int) -> bool:
        return engine.run([Request([1] * n_prompt, n_new, GREEDY)])[0].window_slid

    assert not slid(BLOCK_SIZE, 1)
    assert slid(BLOCK_SIZE, 2)
    assert not slid(4, BLOCK_SIZE - 3)
    assert slid(4, BLOCK_SIZE - 2)
    assert slid(BLOCK_SIZE + 1, 1)


def test_sequences_beyond_max_running_wait_for_a_free_row() -> None:
    engine = _engine(random_model(), max_running=2)
    continuations = [engine.submit(Request([n], 3, GREEDY)) for n in range(5)]
    engine.step()
    assert (engine.n_running, engine.n_waiting) == (2, 3)
    engine.cancel(continuations[0])
    engine.cancel(continuations[4])
    assert (engine.n_running, engine.n_waiting) == (1, 2)
    while engine.n_running:
        engine.step()
    assert [len(continuation.new) for continuation in continuations] == [1, 3, 3, 3, 0]


@both_ways
def test_the_cache_holds_no_more_sequences_than_its_bytes_allow(compiled: bool) -> None:
    model = random_model()
    row_bytes = _engine(model, compiled=compiled)._decoder.row_bytes
    assert _engine(model, cache_bytes=3 * row_bytes, compiled=compiled).max_running == 3
    assert _engine(model, cache_bytes=3 * row_bytes - 1, compiled=compiled).max_running == 2
    assert _engine(model, cache_bytes=1, compiled=compiled).max_running == 1


@both_ways
def test_the_bytes_of_an_engine_grow_with_the_sequences_that_run(compiled: bool) -> None:
    engine = _engine(random_model(), compiled=compiled)
    engine.run([Request([1], 2, GREEDY)])
    before, row_bytes = engine.n_bytes, engine._decoder.row_bytes
    engine.run([Request([1], 2, GREEDY)] * 4)
    assert engine.n_bytes - before >= 3 * row_bytes


def test_what_cannot_be_continued_is_refused() -> None:
    engine = _engine(random_model())
    with pytest.raises(ValueError, match="no tokens"):
        Request([], 1)
    with pytest.raises(ValueError, match="at least 1"):
        Request([1], 0)
    for token in (-1, 97):
        with pytest.raises(ValueError, match="outside of the vocabulary of 97"):
            engine.submit(Request([0, token], 1))


def test_weights_that_are_not_finite_are_refused() -> None:
    model = random_model()
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = math.nan
    with pytest.raises(ValueError, match=r"transformer\.ln_f\.weight is not finite"):
        _engine(model)


@both_ways
def test_a_model_whose_float32_overflows_is_refused_when_that_happens(compiled: bool) -> None:
    model = random_model()
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_fc.weight.mul_(1e20)
            block.mlp.c_proj.weight.mul_(1e20)
    for how in (GREEDY, SamplingConfig(top_k=5), SamplingConfig()):
        for engine in (_engine(model, compiled=compiled), _in_one_shape(model, 2), _captured(model, 2)):
            with pytest.raises(ValueError, match="overflow float32"):
                engine.run([Request([1, 2], 5, how)])


@both_ways
def test_experts_whose_scores_are_equal_in_float32_are_chosen_in_their_order(compiled: bool) -> None:
    model = random_model(use_moe=True, n_experts=4, k=1, norm_topk_prob=False, router_score="sigmoid", moe_stride=1)
    with torch.no_grad():
        for n, layer in enumerate(model.moe_layers.values()):  # logits of 40 and more, rising with the expert's number
            model.transformer.h[n].ln_2.weight.zero_()
            model.transformer.h[n].ln_2.bias.fill_(1.0)
            layer.router.weight.copy_(torch.arange(40.0, 44.0)[:, None].expand(-1, 16) / 16)
    made = _engine(model, compiled=compiled).run([Request([1, 2, 3], 20, GREEDY)])
    assert made[0].new == generate_reference(model.state_dict(), model.config, made[0].request)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_texts_by_a_captured_graph_equal_those_of_the_uncached_loop_in_any_company(name: str) -> None:
    """Sequences join one after another; meanwhile another thread loads engines."""
    model = random_model(**CONFIGS[name])
    requests = _requests(24, 97, MIXED)
    engine = _engine(model, device="cuda", compiled=True, max_running=9)
    assert "CUDA graph" in engine.numerics
    alone = [engine.run([request])[0] for request in requests[:10]]
    _assert_texts_of_reference(model, alone)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(lambda: [_engine(model, device="cuda", compiled=True) for _ in range(3)])
        assert _served_among_others(engine, requests, 10) == _texts(alone)
        loading.result()


_ON_A_GPU = """
import sys
from nanomoe.config import ModelConfig
from nanomoe.generation.engine import Engine, Request
from nanomoe.model.gpt import GPT
config = ModelConfig(block_size=16, n_layer=1, n_head=1, n_embd=128)
model = GPT.build(config, 16_384)
model.init_weights(0)
Engine(model.state_dict(), config, device="cuda", compiled=True).run([Request([1], 4)])
print("numba" in sys.modules)
"""


@pytest.mark.gpu
def test_an_engine_on_a_gpu_imports_no_loops() -> None:
    done = subprocess.run([sys.executable, "-c", _ON_A_GPU], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.gpu
def test_an_engine_that_nobody_has_any_more_frees_its_memory_at_once() -> None:
    model = random_model()

    def engine_that_has_run() -> Engine:
        engine = _engine(model, device="cuda", compiled=True)
        engine.run([Request([1], 8)])
        return engine

    engine_that_has_run()  # what libraries allocate once for a process
    gc.disable()
    try:
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            engine = engine_that_has_run()
            assert torch.cuda.memory_allocated() > before
            del engine
            assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()


def test_all_engines_of_a_device_capture_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS keeps a workspace for each stream that it has seen."""
    made: list[int] = []
    current = [0]

    @contextmanager
    def on(device: torch.device | int) -> Iterator[None]:
        current[0] = device if isinstance(device, int) else device.index or 0
        yield

    cuda_graphs.capture_stream.cache_clear()
    monkeypatch.setattr("torch.cuda.device", on)
    monkeypatch.setattr("torch.cuda.current_device", lambda: current[0])
    monkeypatch.setattr("torch.cuda.Stream", lambda: made.append(current[0]))
    for name in ("cuda", "cuda:0", "cuda:1", "cuda:0", "cuda:1"):
        CudaGraphs(torch.device(name))
    cuda_graphs.capture_stream.cache_clear()
    assert made == [0, 1]
