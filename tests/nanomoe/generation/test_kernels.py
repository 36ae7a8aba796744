"""The compiled loops beside the tensor operations that they stand for, and beside themselves with other rows."""

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

from nanomoe.compiling import LoopPackage
from nanomoe.generation.decoder import CompiledDecoder, Span, TensorDecoder
from nanomoe.generation.kernels import compiling, panels, short_list
from nanomoe.generation.output_layer import CompiledOutputLayer
from tests.nanomoe.generation.models import BLOCK_SIZE, CONFIGS, random_model


def _decoders(**knobs: object) -> tuple[TensorDecoder, CompiledDecoder]:
    """The same weights twice: with tensor operations, and with loops."""
    model = random_model(50, spread=4.0, **knobs)
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    return (
        TensorDecoder(weights, model.config, torch.device("cpu"), 9, in_one_shape=False),
        CompiledDecoder(weights, model.config),
    )


def _spans() -> list[list[Span]]:
    """Steps of nine sequences: their prompts, then single tokens, and one whose window begins anew."""
    prompts = [[(7 * row + place) % 50 for place in range(1 + 2 * row)] for row in range(9)]
    steps = [[Span(row, 0, prompt) for row, prompt in enumerate(prompts)]]
    for n in range(5):
        singles = [Span(row, len(prompt) + n, [(11 * n + row) % 50]) for row, prompt in enumerate(prompts)]
        steps.append([*singles[:4], Span(4, 0, list(range(BLOCK_SIZE))), *singles[5:]])
    return steps


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_step_in_loops_is_the_step_in_tensors(name: str, n_threads: int) -> None:
    tensors, loops = _decoders(**CONFIGS[name])
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        for spans in _spans():
            torch.testing.assert_close(loops.step(spans), tensors.step(spans), atol=2e-5, rtol=1e-4)
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_hidden_state_is_the_same_bits_whatever_is_computed_beside_it(name: str) -> None:
    tokens = [(3 * place) % 50 for place in range(BLOCK_SIZE)]
    _, one_by_one = _decoders(**CONFIGS[name])
    expected = [one_by_one.step([Span(0, place, [token])])[0] for place, token in enumerate(tokens)]
    for n_others in range(8):
        _, loops = _decoders(**CONFIGS[name])
        others = [Span(row, 0, [row + 1, 7]) for row in range(n_others)]
        hidden_NC = loops.step([*others, Span(n_others, 0, tokens[:17])])
        assert torch.equal(hidden_NC[n_others], expected[16])
        others = [Span(row, 2, [row]) for row in range(n_others)]
        hidden_NC = loops.step([Span(n_others, 17, tokens[17:18]), *others])
        assert torch.equal(hidden_NC[0], expected[17])


@given(
    n_rows=st.integers(1, 13), n_outputs=st.integers(1, 300), n_inputs=st.integers(1, 70), seed=st.integers(0, 2**20)
)
def test_a_product_is_its_sum_in_order_whatever_the_number_of_rows(
    n_rows: int, n_outputs: int, n_inputs: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    w_OI = generator.normal(size=(n_outputs, n_inputs)).astype(np.float32)
    x_NI = generator.normal(size=(n_rows, n_inputs)).astype(np.float32)
    packed = panels.pack(w_OI)
    y_NO = np.zeros((n_rows, panels.padded(n_outputs)), np.float32)
    panels.add_products(x_NI, n_rows, packed, 0, len(packed), n_inputs, y_NO, 0)
    expected_NO = np.zeros((n_rows, n_outputs))
    for i in range(n_inputs):  # a float64 product of float32 is exact, so this rounds as a fused multiply-add does,
        exact_NO = x_NI[:, i, None].astype(np.float64) * w_OI[None, :, i] + expected_NO  # but for double rounding
        expected_NO = exact_NO.astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(y_NO[:, :n_outputs], expected_NO, rtol=0, atol=4e-6)
    for n in range(n_rows):
        alone_1O = np.zeros((1, y_NO.shape[1]), np.float32)
        panels.add_products(x_NI[n : n + 1], 1, packed, 0, len(packed), n_inputs, alone_1O, 0)
        assert np.array_equal(alone_1O[0], y_NO[n])


def _output(
    vocab_size: int, seed: int, spread: float, n_different: int | None = None
) -> tuple[CompiledOutputLayer, torch.Tensor]:
    """An output layer of random embeddings, again and again the same `n_different`, and eight hidden states."""
    generator = torch.Generator().manual_seed(seed)
    wte_VC = torch.randn(vocab_size, 33, generator=generator) * 0.05
    x_NC = torch.randn(8, 33, generator=generator) * spread
    if n_different is not None:
        wte_VC = wte_VC[torch.arange(vocab_size) % n_different]
    return CompiledOutputLayer(wte_VC), x_NC


@given(
    seed=st.integers(0, 2**20),
    vocab_size=st.sampled_from([1, 64, 255, 1000, 5000]),
    spread=st.sampled_from([0.0, 0.01, 1.0, 30.0]),
    n_different=st.sampled_from([None, 1, 40]),
    count=st.sampled_from([1, 2, 7, 40, 200, 1000]),
)
def test_a_short_list_holds_the_likeliest_with_the_bits_of_all_logits(
    seed: int, vocab_size: int, spread: float, n_different: int | None, count: int
) -> None:
    output, x_NC = _output(vocab_size, seed, spread, n_different)
    all_ = [row.logits.copy() for row in output.candidates(x_NC, [None] * 8)]
    np.testing.assert_allclose(np.stack(all_), x_NC.numpy() @ output._embedding._wte_VC.T, rtol=1e-5, atol=1e-5)
    for found, logits_V in zip(output.candidates(x_NC, [count] * 8), all_, strict=True):
        least = np.sort(logits_V)[-min(count, vocab_size)]
        if found.ids is None:
            assert np.array_equal(found.logits, logits_V)
        else:
            assert set(np.flatnonzero(logits_V >= least)) <= set(found.ids.tolist())
            assert np.array_equal(found.logits, logits_V[found.ids])
            assert (np.diff(found.ids) > 0).all()


@pytest.mark.parametrize("count", [1, 40, 120])
def test_a_short_list_is_nearly_always_found_and_short(count: int) -> None:
    for seed in range(10):
        output, x_NC = _output(5000, seed, 20.0)
        for found in output.candidates(x_NC, [count] * 8):
            assert found.ids is not None
            assert len(found.ids) < 8 * count + 8


def test_a_list_cut_without_the_bound_misses_likely_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is what makes short lists complete where 8-bit products cut them; nothing else reads it."""
    monkeypatch.setattr(short_list, "_quantize", _without_bound(short_list._quantize))
    missed = 0
    for seed in range(10):
        output, x_NC = _output(5000, seed, 20.0)
        all_ = [row.logits.copy() for row in output.candidates(x_NC, [None] * 8)]
        for found, logits_V in zip(output.candidates(x_NC, [40] * 8), all_, strict=True):
            missed += found.ids is None or not set(np.argsort(-logits_V)[:40]) <= set(found.ids.tolist())
    assert (missed > 0) == compiling.HAS_INT8_PRODUCTS


def _without_bound(quantize):  # type: ignore[no-untyped-def]
    def without(*arguments):  # type: ignore[no-untyped-def]
        quantize(*arguments)
        arguments[-1][:] = 1e-30

    return without


def test_the_folder_of_what_is_compiled_depends_on_every_file_of_the_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    before = compiling.LOOPS.folder.name
    for path in Path(compiling.__file__).parent.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def folder() -> str:
        return LoopPackage(tmp_path).folder.name

    assert folder() == before
    for path in sorted(tmp_path.glob("*.py")):
        source = path.read_bytes()
        path.write_bytes(source + b"\n")
        assert folder() != before
        path.write_bytes(source)
    assert folder() == before


def test_all_is_as_right_on_a_processor_with_avx2_alone() -> None:
    features = llvmlite.binding.get_host_cpu_features()
    for name in list(features):
        if name.startswith(("avx512", "amx")):
            features[name] = False
    environment = os.environ | {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features.flatten()}
    tests = [
        "test_a_step_in_loops_is_the_step_in_tensors",
        "test_a_hidden_state_is_the_same_bits_whatever_is_computed_beside_it",
        "test_a_product_is_its_sum_in_order_whatever_the_number_of_rows",
        "test_a_short_list_holds_the_likeliest_with_the_bits_of_all_logits",
    ]  # fmt: skip
    ask = "from nanomoe.generation.kernels import compiling as c; print(c.HAS_WIDE_VECTORS, c.HAS_INT8_PRODUCTS)"
    asked = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    assert asked.stdout == "False False\n"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *(f"{__file__}::{test}" for test in tests)],
        env=environment, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "20 passed" in done.stdout
