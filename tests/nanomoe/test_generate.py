"""Every text is compared with `generate_reference`, a plain float64 loop over the model itself."""

import gc
import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from nanomoe import generate, graphs
from nanomoe.choosing import Choosing
from nanomoe.config import ModelConfig
from nanomoe.generate import Continuation, Engine, Request, continue_tokens, generate_reference
from nanomoe.model.gpt import GPT
from nanomoe.sampling import Sampling

BLOCK_SIZE = 24
CONFIGS = {
    "dense": {},
    "dense without bias": {"bias": False},
    "moe": {"use_moe": True, "n_experts": 8, "k": 2},
    "moe, every option": {
        "use_moe": True,
        "n_experts": 5,
        "k": 3,
        "moe_stride": 1,
        "norm_topk_prob": False,
        "router_score": "sigmoid",
        "n_shared_experts": 2,
        "expert_hidden_ratio": 0.5,
        "router_bias_update_rate": 0.01,
        "router_noise": True,
        "capacity_factor": 0.1,
        "bias": False,
    },
    "moe, one expert": {"use_moe": True, "n_experts": 1, "k": 1},
}


def _model(vocab_size: int = 97, *, spread: float = 6.0, seed: int = 0, **knobs: object) -> GPT:
    """A random model whose weights are spread so widely that its choices depend on all of the context."""
    config = ModelConfig.model_validate({"block_size": BLOCK_SIZE, "n_layer": 2, "n_head": 2, "n_embd": 16, **knobs})
    model = GPT(config, vocab_size)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(spread)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for layer in model.moe_layers.values():
            if layer.router.balance_bias is not None:
                layer.router.balance_bias.normal_(0, 0.1, generator=generator)
    return model


def _engine(model: GPT, **options: Any) -> Engine:
    return Engine(model.state_dict(), model.config, **options)


both_ways = pytest.mark.parametrize("compiled", [False, True], ids=["tensors", "loops"])


@pytest.fixture(autouse=True)
def several_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let short sequences read the cache in several lengths, too."""
    monkeypatch.setattr("nanomoe.decoder._STRIDE", 8)


@pytest.fixture
def in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read every vocabulary in 8 bits, on every machine."""
    monkeypatch.setattr("nanomoe.output_layer._SMALL_BYTES", 0)
    monkeypatch.setattr("nanomoe.int8._has_fast_ints", lambda _: True)


def _requests(
    n: int, vocab_size: int, samplings: Sequence[Sampling], *, longest: int = 2 * BLOCK_SIZE
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


MIXED = [Sampling(0), Sampling(1.0), Sampling(0.7, top_k=5), Sampling(1.0, top_p=0.8), Sampling(2.0, top_k=1)]


@both_ways
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_text_equals_the_uncached_float64_loop(name: str, compiled: bool) -> None:
    model = _model(**CONFIGS[name])
    requests = _requests(12, 97, [Sampling(0)])
    weights = model.state_dict()
    expected = [generate_reference(weights, model.config, request) for request in requests]
    assert _texts(_engine(model, compiled=compiled).run(requests)) == expected


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_two_hundred_greedy_texts_equal_the_uncached_float64_loop(name: str, in_8_bits: None) -> None:
    model = _model(vocab_size=300, **CONFIGS[name])
    requests = _requests(200, 300, [Sampling(0)], longest=BLOCK_SIZE + 6)
    weights = model.state_dict()
    expected = [generate_reference(weights, model.config, request) for request in requests]
    made = _engine(model, compiled=True).run(requests)
    assert _texts(made) == expected
    assert sum(continuation.window_slid for continuation in made) > 50


@both_ways
@pytest.mark.parametrize("name", ["dense", "moe", "moe, every option"])
def test_sampled_text_equals_the_uncached_float64_loop(name: str, compiled: bool) -> None:
    model = _model(**CONFIGS[name])
    requests = _requests(10, 97, MIXED)
    weights = model.state_dict()
    expected = [generate_reference(weights, model.config, request) for request in requests]
    assert _texts(_engine(model, compiled=compiled).run(requests)) == expected


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(1.0)])
def test_nearly_every_token_is_decided_without_all_logits(
    sampling: Sampling, in_8_bits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(vocab_size=700)
    seen = []
    among_all = Choosing._among_all

    def counted(choosing: Any, chosen: list[int]) -> None:
        seen.append(len(chosen))
        among_all(choosing, chosen)

    monkeypatch.setattr(Choosing, "_among_all", counted)
    engine = _engine(model, compiled=True)
    made = engine.run([Request([n], BLOCK_SIZE - 1, sampling, seed=n) for n in range(20)])
    n_tokens = sum(len(continuation.new) for continuation in made)
    assert sum(seen) < 0.05 * n_tokens
    assert engine.n_recomputed < 0.05 * n_tokens


@both_ways
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_a_text_does_not_depend_on_who_else_is_served(name: str, compiled: bool, in_8_bits: None) -> None:
    model = _model(vocab_size=700, **CONFIGS[name])
    requests = _requests(40, 700, MIXED)
    alone = [_engine(model).run([request])[0].new for request in requests[:15]]

    crowded = _engine(model, max_running=17, compiled=compiled)
    chance = random.Random(1)  # noqa: S311
    continuations: list[Continuation] = []
    for request in requests:
        continuations.append(crowded.submit(request))
        for _ in range(chance.randrange(4)):
            crowded.step()
        if len(continuations) > 20 and chance.random() < 0.3:
            crowded.cancel(continuations[chance.randrange(15, len(continuations))])
    while not all(continuation.finished for continuation in continuations):
        crowded.step()
    assert _texts(continuations[:15]) == alone


def _roughened(engine: Engine) -> Engine:
    """The engine as on a machine that rounds far worse: hidden states moved by as much as their bound allows."""
    decoder = engine._decoder
    generator = torch.Generator().manual_seed(0)

    def roughened(compute: Callable[..., tuple[Tensor, list[bool]]]) -> Callable[..., tuple[Tensor, list[bool]]]:
        def moved(*args: Sequence[int]) -> tuple[Tensor, list[bool]]:
            hidden_NC, certain = compute(*args)
            direction_NC = torch.randn(hidden_NC.shape, generator=generator)
            return hidden_NC + 0.99 * decoder.error * direction_NC / direction_NC.norm(dim=1, keepdim=True), certain

        return moved

    decoder.step, decoder.prefill = roughened(decoder.step), roughened(decoder.prefill)  # type: ignore[method-assign]
    return engine


@pytest.mark.parametrize("bounded", [True, False])
def test_texts_survive_any_error_within_the_bound_because_of_the_bound(
    bounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanomoe.decoder.SAFETY", 1e6)
    model = _model(spread=3.0)
    requests = _requests(10, 97, MIXED)
    weights = model.state_dict()
    expected = [generate_reference(weights, model.config, request) for request in requests]
    engine = _roughened(_engine(model))
    if bounded:
        assert _texts(engine.run(requests)) == expected
        assert engine.n_recomputed > 0
    else:
        engine._output._hidden_error = 0.0
        assert _texts(engine.run(requests)) != expected


@both_ways
def test_routing_too_close_to_call_is_recomputed_and_the_cache_put_right(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(**CONFIGS["moe"])
    requests = _requests(8, 97, [Sampling(0)])
    weights = model.state_dict()
    expected = [generate_reference(weights, model.config, request) for request in requests]
    engine = _engine(model, compiled=compiled)
    monkeypatch.setattr(engine._decoder, "_router_error", 0.02)
    assert _texts(engine.run(requests)) == expected
    assert engine.n_recomputed > 5


def test_most_tokens_are_decided_in_float32() -> None:
    for name in ("dense", "moe"):
        model = _model(spread=3.0, **CONFIGS[name])
        requests = _requests(20, 97, MIXED)
        engine = _engine(model)
        engine.run(requests)
        assert engine.n_recomputed < 0.05 * sum(request.max_new_tokens for request in requests)


@pytest.mark.parametrize("spread", [1.0, 4.0, 10.0])
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_the_error_bound_is_far_above_the_errors_that_occur(name: str, spread: float) -> None:
    model = _model(spread=spread, **CONFIGS[name])
    decoder = _engine(model)._decoder
    chance = random.Random(3)  # noqa: S311
    largest = 0.0
    for _ in range(40):
        window = [chance.randrange(97) for _ in range(chance.randint(1, BLOCK_SIZE))]
        hidden_NC, (certain,) = decoder.prefill([window])
        if certain:
            largest = max(largest, (hidden_NC[0].double() - decoder.exact(window)).norm().item())
    assert 0 < largest < decoder.error / 10


@both_ways
def test_a_large_vocabulary_is_read_in_8_bits_with_the_same_result(compiled: bool, in_8_bits: None) -> None:
    model = _model(vocab_size=1000)
    requests = _requests(20, 1000, [*MIXED, Sampling(0.9, top_k=200), Sampling(0.3, top_k=999), Sampling(5.0)])
    weights = model.state_dict()
    expected = [generate_reference(weights, model.config, request) for request in requests]
    engine = _engine(model, compiled=compiled)
    assert "int8" in engine.numerics
    assert _texts(engine.run(requests)) == expected


def test_window_slid_tells_whether_a_token_was_chosen_without_the_oldest_ones() -> None:
    engine = _engine(_model())

    def slid(n_prompt: int, n_new: int) -> bool:
        return engine.run([Request([1] * n_prompt, n_new, Sampling(0))])[0].window_slid

    assert not slid(BLOCK_SIZE, 1)
    assert slid(BLOCK_SIZE, 2)
    assert not slid(4, BLOCK_SIZE - 3)
    assert slid(4, BLOCK_SIZE - 2)
    assert slid(BLOCK_SIZE + 1, 1)


def test_logprobs_are_those_of_the_models_own_softmax() -> None:
    model = _model(**CONFIGS["moe"])
    engine = _engine(model)
    request = Request([5, 6, 7], 30, Sampling(0.5, top_k=10), seed=1, logprobs=3)
    continuation = engine.run([request])[0]
    tokens = continuation.tokens
    assert len(continuation.logprobs) == 30
    for n, found in enumerate(continuation.logprobs):
        window_BT = torch.tensor([tokens[: 3 + n][-BLOCK_SIZE:]])
        with torch.no_grad():
            expected = model.double()(window_BT).logits_BTV[0, -1].log_softmax(-1)
        assert math.isclose(found.chosen, expected[tokens[3 + n]].item(), abs_tol=1e-4)
        assert list(found.likeliest) == expected.topk(3).indices.tolist()
    silent = engine.run([Request([5, 6, 7], 30, Sampling(0.5, top_k=10), seed=1)])[0]
    assert silent.new == continuation.new
    assert silent.logprobs == []


def test_sequences_beyond_max_running_wait_for_a_free_slot() -> None:
    engine = _engine(_model(), max_running=2)
    continuations = [engine.submit(Request([n], 3, Sampling(0))) for n in range(5)]
    engine.step()
    assert (engine.n_running, engine.n_waiting) == (2, 3)
    engine.cancel(continuations[0])
    engine.cancel(continuations[4])
    assert (engine.n_running, engine.n_waiting) == (1, 2)
    while engine.n_running:
        engine.step()
    assert [len(continuation.new) for continuation in continuations] == [1, 3, 3, 3, 0]


def test_the_cache_holds_no_more_sequences_than_its_bytes_allow() -> None:
    model = _model()
    row_bytes = _engine(model)._decoder._cache.nbytes
    assert _engine(model, cache_bytes=3 * row_bytes).max_running == 3
    assert _engine(model, cache_bytes=3 * row_bytes - 1).max_running == 2
    assert _engine(model, cache_bytes=1).max_running == 1


def test_many_prompts_are_prefilled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    requests = _requests(20, 97, [Sampling(0)])
    whole = _texts(_engine(model).run(requests))
    monkeypatch.setattr(generate, "_PREFILL_TOKENS", 30)
    assert _texts(_engine(model).run(requests)) == whole


def test_what_cannot_be_continued_is_refused() -> None:
    engine = _engine(_model())
    with pytest.raises(ValueError, match="no tokens"):
        Request([], 1)
    with pytest.raises(ValueError, match="at least 1"):
        Request([1], 0)
    with pytest.raises(ValueError, match="top_k"):
        Request([1], 1, Sampling(1.0, top_k=0))
    for token in (-1, 97):
        with pytest.raises(ValueError, match="outside of the vocabulary of 97"):
            engine.submit(Request([0, token], 1))


def test_weights_that_are_not_finite_are_refused() -> None:
    model = _model()
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = math.nan
    with pytest.raises(ValueError, match=r"transformer\.ln_f\.weight is not finite"):
        _engine(model)


def test_a_model_continues_tokens_as_its_checkpoint_would() -> None:
    model = _model(**CONFIGS["moe"])
    added = continue_tokens(model, [1, 2, 3], max_new_tokens=30, temperature=0.9, top_k=5, seed=11)
    request = Request([1, 2, 3], 30, Sampling(0.9, 5), seed=11)
    assert added == generate_reference(model.state_dict(), model.config, request)
    assert continue_tokens(model, [1], max_new_tokens=0, temperature=0.0, top_k=None, seed=0) == []


@pytest.mark.parametrize("n_tokens", [1, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_each_tokens_own_experts_compute_what_one_by_one_does(n_tokens: int, bias: bool) -> None:
    """A copy of the experts of few tokens, all experts for many."""
    model = _model(**CONFIGS["moe, every option"] | {"bias": bias})
    experts = _engine(model)._decoder._layers[0].experts
    assert experts is not None
    assert (experts.b_in is not None) == bias
    generator = torch.Generator().manual_seed(0)
    x_NC = torch.randn(n_tokens, 16, generator=generator)
    chosen_NK = torch.randint(5, (n_tokens, 3), generator=generator)
    made_NKC = experts.chosen(chosen_NK, x_NC)
    for n in range(n_tokens):
        for slot, expert in enumerate(chosen_NK[n].tolist()):
            torch.testing.assert_close(made_NKC[n, slot], experts.one(expert, x_NC[n : n + 1])[0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_text_by_captured_graphs_equals_the_uncached_float64_loop(name: str) -> None:
    """Sequences join one after another, so that the cache moves and graphs are captured anew; meanwhile another thread
    loads engines."""
    model = _model(**CONFIGS[name])
    requests = _requests(12, 97, MIXED)
    weights = model.state_dict()
    expected = [generate_reference(weights, model.config, request) for request in requests]
    engine = _engine(model, device="cuda", compiled=True)
    assert "CUDA graph" in engine.numerics
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(lambda: [_engine(model, device="cuda", compiled=True) for _ in range(3)])
        continuations = []
        for request in requests:
            continuations.append(engine.submit(request))
            engine.step()
            engine.step()
        while not all(continuation.finished for continuation in continuations):
            engine.step()
        loading.result()
    assert _texts(continuations) == expected
    assert engine.n_recomputed < sum(len(text) for text in expected) / 4


_ON_A_GPU = """
import sys
from nanomoe.config import ModelConfig
from nanomoe.generate import Engine, Request
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
    model = _model()

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

    graphs._capture_stream.cache_clear()
    monkeypatch.setattr("torch.cuda.device", on)
    monkeypatch.setattr("torch.cuda.current_device", lambda: current[0])
    monkeypatch.setattr("torch.cuda.Stream", lambda: made.append(current[0]))
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: (0, 0))
    for name in ("cuda", "cuda:0", "cuda:1", "cuda:0", "cuda:1"):
        graphs.GraphedStep(torch.device(name))
    graphs._capture_stream.cache_clear()
    assert made == [0, 1]


def test_sigmoid_scores_that_are_equal_in_float64_are_not_decided_by_their_logits() -> None:
    model = _model(use_moe=True, n_experts=4, k=1, norm_topk_prob=False, router_score="sigmoid", moe_stride=1)
    with torch.no_grad():
        for layer in model.moe_layers.values():  # logits of 40 and more, rising with the expert's number
            layer.router.weight.zero_()
        model.transformer.h[0].ln_2.bias.fill_(1.0)
        for n, layer in enumerate(model.moe_layers.values()):
            model.transformer.h[n].ln_2.weight.zero_()
            model.transformer.h[n].ln_2.bias.fill_(1.0)
            layer.router.weight.copy_(torch.arange(40.0, 44.0)[:, None].expand(-1, 16) / 16)
    request = Request([1, 2, 3], 20, Sampling(0))
    for compiled in (False, True):
        engine = _engine(model, compiled=compiled)
        assert engine.run([request])[0].new == generate_reference(model.state_dict(), model.config, request)


@pytest.mark.parametrize("top_k", [200, 599, 600, 601, 1000])
@pytest.mark.parametrize("compiled", [False, True])
def test_any_top_k_is_right_for_a_vocabulary_that_fills_no_whole_block(
    top_k: int, compiled: bool, in_8_bits: None
) -> None:
    model = _model(601)
    requests = [
        Request([1, 2], 12, Sampling(0.9, top_k, top_p), seed=seed) for seed in range(3) for top_p in (None, 0.9)
    ]
    expected = [generate_reference(model.state_dict(), model.config, request) for request in requests]
    assert _texts(_engine(model, compiled=compiled).run(requests)) == expected


def test_a_model_whose_float32_overflows_is_continued_in_float64() -> None:
    model = _model()
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_fc.weight.mul_(1e20)
            block.mlp.c_proj.weight.mul_(1e20)
    requests = [Request([1, 2], 5, sampling, seed=1) for sampling in (Sampling(0), Sampling(1.0, 5), Sampling(1.0))]
    expected = [generate_reference(model.state_dict(), model.config, request) for request in requests]
    for compiled in (False, True):
        assert _texts(_engine(model, compiled=compiled).run(requests)) == expected
