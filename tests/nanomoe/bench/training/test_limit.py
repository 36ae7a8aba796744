"""The limit counts the products and bytes that it says."""

import pytest
import torch

from nanomoe.bench.training import limit
from nanomoe.bench.training.shapes import SHAPES, Shape
from nanomoe.model.gpt import GPT

CPU = torch.device("cpu")


def matrix_weights(shape: Shape) -> int:
    """Weights in matrix products for one token: of the experts only the chosen ones."""
    config = shape.config
    total = 0
    for name, p in GPT.build(config, shape.vocab_size).named_parameters():
        if p.dim() == 3:
            total += p.numel() * config.k // config.n_experts
        elif p.dim() == 2 and "wpe" not in name and not name.endswith(("b_in", "b_out")):
            total += p.numel()
    return total


@pytest.mark.parametrize("name", ["reference", "small"])
@pytest.mark.parametrize("mixture", [False, True])
def test_products_have_the_published_flops_of_the_matrices(name: str, mixture: bool) -> None:
    shape = SHAPES[name].mixture() if mixture else SHAPES[name]
    C, T = shape.config.n_embd, shape.length
    published = shape.n_tokens * (6 * matrix_weights(shape) + 12 * shape.config.n_layer * C * T)
    counted = sum(product.flops for product in limit.products_of(shape))
    if mixture and shape.n_tokens * shape.config.k % shape.config.n_experts:
        assert published < counted < 1.01 * published, "experts get whole rows"
    else:
        assert counted == published
    assert published == pytest.approx(shape.flops, rel=0.01), "the formula counts biases and norms as well"


def test_shared_experts_and_noise_are_products_too(tiny: Shape) -> None:
    plain = tiny.mixture()
    config = plain.config.model_copy(update={"n_shared_experts": 1, "router_noise": True})
    more = Shape("more", config, plain.vocab_size, plain.n_windows, plain.length)
    R, C, F, E = plain.n_tokens, config.n_embd, config.expert_hidden, config.n_experts
    added = sum(p.flops for p in limit.products_of(more)) - sum(p.flops for p in limit.products_of(plain))
    assert added == 6 * R * (2 * C * F + C * E) * len(config.moe_layers)


@pytest.mark.parametrize("mixture", [False, True])
def test_the_update_moves_seven_numbers_of_every_parameter(tiny: Shape, mixture: bool) -> None:
    shape = tiny.mixture() if mixture else tiny
    measured = limit.measure(shape, "float32", CPU)
    n_params = sum(p.numel() for p in GPT.build(shape.config, shape.vocab_size).parameters())
    assert measured.update_bytes == 4 * 7 * n_params
    assert measured.products_flops == sum(product.flops for product in limit.products_of(shape))
    assert measured.products_seconds > 0
    assert measured.seconds == measured.products_seconds + measured.update_bytes / measured.bytes_per_sec


def test_measuring_leaves_the_number_of_threads_as_it_was(tiny: Shape) -> None:
    before = torch.get_num_threads()
    limit.measure(tiny, "bfloat16", CPU)
    assert torch.get_num_threads() == before
