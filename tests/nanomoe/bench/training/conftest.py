"""Shapes so small that a step takes milliseconds."""

import pytest

from nanomoe.bench.training.shapes import Shape
from nanomoe.config import JobConfig


@pytest.fixture
def tiny() -> Shape:
    """Three windows of bytes, without dropout, clipped: all that a peer could do otherwise shows in the loss."""
    config = JobConfig(
        block_size=8,
        n_layer=2,
        n_head=2,
        n_embd=16,
        dropout=0.0,
        lr=1e-2,
        grad_clip=0.5,
        weight_decay=0.1,
        batch_size=3,
    )
    return Shape("tiny", config, 256, n_windows=3, length=8)
