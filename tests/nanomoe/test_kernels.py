"""The compiled loops beside the tensor operations, and beside the law, that they stand for."""

import os
import subprocess
import sys
from pathlib import Path

import llvmlite.binding
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanomoe.config import ModelConfig
from nanomoe.decoder import Decoder
from nanomoe.kernels import products
from nanomoe.model.gpt import GPT
from nanomoe.output_layer import OutputLayer
from nanomoe.sampling import NoiseStream, Sampling, choose

EVERY_OPTION = {
    "use_moe": True, "n_experts": 5, "k": 3, "moe_stride": 1, "norm_topk_prob": False, "router_score": "sigmoid",
    "n_shared_experts": 2, "expert_hidden_ratio": 0.5, "router_bias_update_rate": 0.01, "bias": False,
}  # fmt: skip


def decoders(**knobs: object) -> tuple[Decoder, Decoder]:
    """The same weights twice: with tensor operations, and with loops."""
    config = ModelConfig.model_validate({"block_size": 40, "n_layer": 3, "n_head": 2, "n_embd": 24, **knobs})
    model = GPT(config, 50)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)
    weights = model.state_dict()
    return Decoder(weights, config, n_rows=9), Decoder(weights, config, n_rows=9, compiled=True)


@pytest.mark.parametrize(
    "knobs", [{}, {"bias": False}, {"use_moe": True}, {"use_moe": True, "k": 1, "moe_stride": 1}, EVERY_OPTION]
)
@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_step_in_loops_is_the_step_in_tensors(knobs: dict[str, object], n_threads: int) -> None:
    tensors, loops = decoders(**knobs)
    prompts = [[(7 * row + place) % 50 for place in range(1 + 3 * row)] for row in range(9)]
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        for decoder in (tensors, loops):
            decoder.prefill(prompts, range(9))
        positions = [len(prompt) for prompt in prompts]
        for _ in range(5):
            tokens = [(11 * position + row) % 50 for row, position in enumerate(positions)]
            expected_NC, expected_certain = tensors.step(tokens, positions)
            hidden_NC, certain = loops.step(tokens, positions)
            torch.testing.assert_close(hidden_NC, expected_NC, atol=2e-5, rtol=1e-5)
            assert certain == expected_certain
            positions = [position + 1 for position in positions]
        torch.testing.assert_close(loops._cache, tensors._cache, atol=2e-5, rtol=1e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("n", range(1, 10))
def test_any_number_of_rows_is_computed(n: int) -> None:
    tensors, loops = decoders()
    tokens, positions = list(range(n)), [0] * n
    torch.testing.assert_close(
        loops.step(tokens, positions)[0], tensors.step(tokens, positions)[0], atol=2e-5, rtol=1e-5
    )


@given(
    n_rows=st.integers(1, 30), vocab_size=st.integers(1, 300), n_embd=st.integers(1, 70), seed=st.integers(0, 2**20),
    largest=st.sampled_from([1, 127]),
)  # fmt: skip
def test_products_are_exact_whoever_makes_them(
    n_rows: int, vocab_size: int, n_embd: int, seed: int, largest: int
) -> None:
    generator = np.random.default_rng(seed)
    table_VC = generator.integers(-largest, largest, (vocab_size, n_embd), np.int8, endpoint=True)
    rows_NC = generator.integers(-largest, largest, (n_rows, n_embd), np.int8, endpoint=True)
    if largest == 127:  # where intermediate sums are largest
        table_VC, rows_NC = np.sign(table_VC) * np.int8(127), np.full_like(rows_NC, 127)
    expected_NV = rows_NC.astype(np.int32) @ table_VC.T.astype(np.int32)
    expected_NG = np.maximum.reduceat(expected_NV, range(0, vocab_size, products.GROUP), axis=1)
    assert np.array_equal(products.kept_products(expected_NV).largest, expected_NG)
    made = products.kept_products(expected_NV)
    if products.has_instruction():
        table = products.Table(table_VC)
        assert np.array_equal(table.all_products(rows_NC)[:, :vocab_size], expected_NV)
        made = table.products(rows_NC)
        assert np.array_equal(made.largest, expected_NG)
    group_1T = np.empty((1, products.GROUP), np.int32)
    for n, group in ((0, 0), (n_rows - 1, expected_NG.shape[1] - 1)):
        products.read_group(made, n, group, group_1T)
        expected_T = expected_NV[n, group * products.GROUP :][: products.GROUP]
        assert np.array_equal(group_1T[0, : len(expected_T)], expected_T)
        assert (group_1T[0, len(expected_T) :] < -127 * 127 * 70).all()


def output_layer(
    vocab_size: int, seed: int, spread: float, n_different: int | None = None
) -> tuple[OutputLayer, torch.Tensor]:
    """An output layer of random embeddings, again and again the same `n_different`, that is read in 8 bits, and eight
    hidden states."""
    generator = torch.Generator().manual_seed(seed)
    wte_VC = torch.randn(vocab_size, 32, generator=generator) * 0.05
    x_NC = torch.randn(8, 32, generator=generator) * spread
    if n_different is not None:
        wte_VC = wte_VC[torch.arange(vocab_size) % n_different]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("nanomoe.output_layer._SMALL_BYTES", 0)
        patched.setattr("nanomoe.int8._has_fast_ints", lambda _: True)
        return OutputLayer(wte_VC, 1e-7, compiled=True), x_NC


def exact(output: OutputLayer, x_NC: torch.Tensor) -> np.ndarray:
    return (x_NC.double() @ output._wte_VC.double().T).numpy()


@given(
    seed=st.integers(0, 2**20),
    vocab_size=st.sampled_from([64, 255, 1000, 5000]),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_the_likeliest_token_is_that_of_the_exact_logits(seed: int, vocab_size: int, spread: float) -> None:
    output, x_NC = output_layer(vocab_size, seed, spread)
    tokens = output.likeliest(x_NC, output.errors(x_NC))
    for token, logits in zip(tokens, exact(output, x_NC), strict=True):
        assert token in (None, logits.argmax())


@given(
    seed=st.integers(0, 2**20),
    vocab_size=st.sampled_from([64, 255, 1000, 5000]),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
    temperature=st.sampled_from([1e-300, 0.1, 1.0, 20.0]),
    top_k=st.sampled_from([None, 2, 40, 200, 4000]),
)
def test_a_drawn_token_is_that_of_the_exact_logits(
    seed: int, vocab_size: int, spread: float, temperature: float, top_k: int | None
) -> None:
    output, x_NC = output_layer(vocab_size, seed, spread)
    sampling = Sampling(temperature, top_k)
    noises = [NoiseStream(seed, n, vocab_size).draw() for n in range(len(x_NC))]
    tokens = output.draw(x_NC, output.errors(x_NC), [sampling] * len(x_NC), noises)
    for token, logits, noise in zip(tokens, exact(output, x_NC), noises, strict=True):
        assert token in (None, choose(logits, sampling, noise))


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.8, 40), Sampling(0.8, 200)])
def test_drawing_nearly_always_decides(sampling: Sampling) -> None:
    undecided = 0
    for seed in range(40):
        output, x_NC = output_layer(5000, seed, 20.0)
        noises = [NoiseStream(seed, n, 5000).draw() for n in range(len(x_NC))]
        undecided += output.draw(x_NC, output.errors(x_NC), [sampling] * len(x_NC), noises).count(None)
    assert undecided < 0.05 * 40 * 8


def test_the_likeliest_token_is_nearly_always_decided() -> None:
    undecided = 0
    for seed in range(40):
        output, x_NC = output_layer(5000, seed, 20.0)
        undecided += output.likeliest(x_NC, output.errors(x_NC)).count(None)
    assert undecided < 0.05 * 40 * 8


def test_two_equal_tokens_are_never_told_apart() -> None:
    output, x_NC = output_layer(1000, 3, 1.0, n_different=1)
    assert output.likeliest(x_NC, output.errors(x_NC)) == [None] * 8


_WITHOUT_OPENMP = """
import threading
import torch
from nanomoe.config import ModelConfig
from nanomoe.generate import Engine, Request
from nanomoe.model.gpt import GPT
torch.set_num_threads(2)
config = ModelConfig(block_size=40, n_layer=1, n_head=1, n_embd=16)
model = GPT(config, 50)
model.init_weights(0)
def load():
    for _ in range(20):
        Engine(model.state_dict(), config, compiled=True)
engine = Engine(model.state_dict(), config, compiled=True)
loading = threading.Thread(target=load)
loading.start()
while loading.is_alive():
    engine.run([Request([n], 30) for n in range(16)])
print("done")
"""


def test_engines_are_loaded_while_others_step_where_there_is_no_openmp() -> None:
    environment = os.environ | {"NUMBA_THREADING_LAYER": "workqueue", "OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_OPENMP], env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_all_is_as_exact_on_a_processor_without_the_instruction() -> None:
    features = llvmlite.binding.get_host_cpu_features()
    features["avx512vnni"] = False
    environment = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features.flatten(), "NUMBA_OPT": "1"}
    tests = ["test_products_are_exact_whoever_makes_them", "test_the_likeliest_token_is_that_of_the_exact_logits",
             "test_a_drawn_token_is_that_of_the_exact_logits"]  # fmt: skip
    ask = "from nanomoe.kernels.products import has_instruction; print(has_instruction())"
    asked = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    assert asked.stdout == "False\n"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *(f"{__file__}::{test}" for test in tests)],
        env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


def test_loading_the_loops_leaves_torch_its_number_of_threads() -> None:
    ask = "import torch; import nanomoe.kernels.products; print(torch.get_num_threads())"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    asked = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    assert asked.stdout == "1\n"
