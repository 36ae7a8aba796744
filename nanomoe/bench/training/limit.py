"""The least time of a training step on this machine: its matrix products, and the bytes that the update must move.

Both at the speed that the machine shows in the same run: each product alone at its own shape, and a stream over as many
bytes as the update has. Shape letters: R tokens of the step, T of a window, B windows, C channels, F hidden channels, H
heads, D = C / H, V vocabulary, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nanomoe.bench import machine
from nanomoe.bench.training.shapes import Shape

_TRY_SECONDS = 0.01
"""Least duration of a try of one product: there are dozens."""

BYTES_PER_PARAMETER = 28
"""AdamW in float32 reads a weight, its gradient and its two moments, and writes the weight and the moments."""

_BYTES_IN_MEMORY = 16
"""Bytes of memory per parameter: weight, gradient and two moments, in float32."""


@dataclass(frozen=True)
class Product:
    """Equal matrix products of a step: `n_matrices` of (rows, inner) and (inner, columns) in one call."""

    rows: int
    inner: int
    columns: int
    n_matrices: int = 1
    times: int = 1
    """How many such calls a step has."""

    @property
    def flops(self) -> int:
        """Floating-point operations of all of them."""
        return 2 * self.rows * self.inner * self.columns * self.n_matrices * self.times


@dataclass(frozen=True)
class Limit:
    """The least time of a step with one type of products."""

    precision: str
    """Type of the products."""

    products_seconds: float
    """Seconds of all matrix products, each at the fastest that was seen."""

    products_flops: int
    """Floating-point operations of these products."""

    update_bytes: int
    """Bytes that AdamW reads and writes."""

    bytes_per_sec: float
    """Bytes a second that this machine moves where as many lie in memory."""

    peak_flops_per_sec: float
    """Floating-point operations a second of one large product: what MFU is a share of."""

    @property
    def seconds(self) -> float:
        """The products, then the update."""
        return self.products_seconds + self.update_bytes / self.bytes_per_sec


def measure(shape: Shape, precision: str, device: torch.device) -> Limit:
    """Measure the limit of a shape's steps."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    products = list(products_of(shape))
    return Limit(
        precision=precision,
        products_seconds=sum(each.times * _seconds(each, dtype, device) for each in products),
        products_flops=sum(each.flops for each in products),
        update_bytes=BYTES_PER_PARAMETER * shape.n_params,
        bytes_per_sec=machine.stream_bandwidth(_BYTES_IN_MEMORY * shape.n_params, device),
        peak_flops_per_sec=machine.peak_flops_per_sec(dtype, device),
    )


def products_of(shape: Shape) -> Iterator[Product]:
    """The matrix products of a step, forward and backward. Experts count as evenly used, and attention as if a token
    met the later ones too, which is what products of whole matrices compute."""
    config = shape.config
    R, T, C = shape.n_tokens, shape.length, config.n_embd
    heads, D = shape.n_windows * config.n_head, C // config.n_head
    n_moe = len(config.moe_layers)
    yield from _linear(R, C, 3 * C, times=config.n_layer)
    yield from _linear(R, C, C, times=config.n_layer)
    yield Product(T, D, T, heads, times=2 * config.n_layer)
    yield Product(T, T, D, heads, times=4 * config.n_layer)
    if n_moe < config.n_layer:
        yield from _linear(R, C, 4 * C, times=config.n_layer - n_moe)
        yield from _linear(R, 4 * C, C, times=config.n_layer - n_moe)
    if n_moe:
        F = config.expert_hidden
        yield from _linear(R, C, config.n_experts, times=n_moe * (2 if config.router_noise else 1))
        for rows, n_experts in ((-(-R * config.k // config.n_experts), config.n_experts), (R, config.n_shared_experts)):
            if n_experts:
                yield from _linear(rows, C, F, n_matrices=n_experts, times=n_moe)
                yield from _linear(rows, F, C, n_matrices=n_experts, times=n_moe)
    yield from _linear(R, C, shape.vocab_size)


def _linear(rows: int, n_in: int, n_out: int, *, n_matrices: int = 1, times: int = 1) -> Iterator[Product]:
    """A layer's output, the gradient of its input, and that of its weights."""
    yield Product(rows, n_in, n_out, n_matrices, times)
    yield Product(rows, n_out, n_in, n_matrices, times)
    yield Product(n_out, rows, n_in, n_matrices, times)


def _seconds(product: Product, dtype: torch.dtype, device: torch.device) -> float:
    """The least seconds of one call, with one thread or all."""

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape if product.n_matrices == 1 else (product.n_matrices, *shape), device=device).to(dtype)

    left, right = numbers(product.rows, product.inner), numbers(product.inner, product.columns)
    out = numbers(product.rows, product.columns)
    most = torch.get_num_threads()
    seconds = []
    for n_threads in {1, most} if device.type == "cpu" else {most}:
        torch.set_num_threads(n_threads)
        try:
            best = machine.best_seconds(lambda: torch.matmul(left, right, out=out), _TRY_SECONDS, device)
        finally:
            torch.set_num_threads(most)
        seconds.append(best)
    return min(seconds)
