"""A mixture of experts in place of an MLP, written out; `nanomoe.model.moe` is its reference.

Each token's row is copied to those of its experts, which lie one below the other, expert by expert; an expert's
products take just its rows, and one without any does nothing. Capacity, balance and counts are those of the whole
micro-batch.
"""

import numpy as np
import torch
from torch import Tensor

from nanomoe.config import JobConfig
from nanomoe.model.dropout import Site
from nanomoe.model.moe import expert_capacity
from nanomoe.training.steps.buffers import Buffer
from nanomoe.training.steps.experts import Experts, sizes_of
from nanomoe.training.steps.feed_forward import Drop, FeedForward
from nanomoe.training.steps.loops import expert_rows, routing
from nanomoe.training.steps.loops.compiling import Keys
from nanomoe.training.steps.parameters import FlatParameters
from nanomoe.training.steps.router import Router, RouterBuffers

_KEEPS_ALL: Drop = np.uint32(0), np.float32(1)


class MixtureBuffers:
    """What no layer's mixture keeps, one for all of them. A rows of chosen experts, S * N of shared ones."""

    def __init__(self, T: int, N: int, config: JobConfig, dtype: torch.dtype) -> None:
        """`T`: tokens of a window; `N`: of the micro-batch. `dtype`: type of the products."""
        A, SN, C, F = N * config.k, N * config.n_shared_experts, config.n_embd, config.expert_hidden
        self.T, self.N, self.A, self.dtype = T, N, A, dtype
        self.d_rows, self.d_shared = Buffer(A, C, dtype), Buffer(SN, C, dtype)
        self.wide, self.shared_wide = Buffer(A, F, dtype), Buffer(SN, F, dtype)
        self.router = RouterBuffers(N, config)
        self.no_bias = np.zeros(C, np.float32), np.zeros(C, np.float32)


class MixtureFeedForward(FeedForward):
    """Router and experts over N rows."""

    def __init__(
        self, parameters: FlatParameters, name: str, config: JobConfig, drop: Drop, buffers: MixtureBuffers
    ) -> None:
        """`name`: of the module. `drop`: of each expert's output."""
        self.bias, self.d_bias = buffers.no_bias
        self.drop = _KEEPS_ALL
        self._drop, self._buffers = drop, buffers
        T, N, A, E, K, C = buffers.T, buffers.N, buffers.A, config.n_experts, config.k, config.n_embd
        self._router = Router(parameters, f"{name}.router", T, N, config, buffers.router)
        factor = config.capacity_factor
        self._capacity = A if factor is None else expert_capacity(factor, N, K, E)
        self._rows = Buffer(A, C, buffers.dtype)
        self._experts = Experts(parameters, f"{name}.experts", E, C, buffers.wide)
        self._starts_E1, self._tokens_A = np.zeros(E + 1, np.int64), np.zeros(A, np.int64)
        self._slots_NK = np.zeros((N, K), np.int64)
        self._n_shared = config.n_shared_experts
        self._shared = Experts(parameters, f"{name}.shared", self._n_shared, C, buffers.shared_wide)
        self._shared_starts = N * np.arange(self._n_shared + 1)

    @property
    def counts(self) -> Tensor:
        """int64: the micro-batch's assignments to each expert, before any is dropped."""
        return torch.from_numpy(self._router.counts_E.copy())

    @property
    def dropped(self) -> Tensor:
        """int64, one number: the micro-batch's assignments beyond the capacity."""
        return torch.tensor(self._buffers.A - int(self._starts_E1[-1]))

    def forward(self, x: Buffer, keys: Keys, out: Buffer) -> None:
        router, experts, shared = self._router, self._experts, self._shared
        router.forward(x, keys[Site.ROUTER_NOISE])
        n_rows = routing.assign(
            router.chosen_NK, router.counts_E, self._capacity, self._starts_E1, self._slots_NK, self._tokens_A
        )
        expert_rows.gather(x.array, self._tokens_A, n_rows, self._rows.array)
        sizes = sizes_of(self._starts_E1, self._buffers.A)
        experts.forward(self._rows.split(sizes), self._rows.split_transposed(sizes), self._starts_E1)
        shared.forward([x.tensor] * self._n_shared, [x.transposed] * self._n_shared, self._shared_starts)
        expert_rows.combine(
            self._buffers.T, experts.out.array, experts.b_out, router.chosen_NK, self._slots_NK, router.gates_NK,
            shared.out.array, shared.b_out, keys[Site.MLP_OUTPUT], *self._drop, out.array,
        )  # fmt: skip

    def backward(self, x: Buffer, keys: Keys, d_out: Buffer, d_x: Buffer, share: float, *, adds: bool) -> None:
        router, experts, shared, buffers = self._router, self._experts, self._shared, self._buffers
        expert_rows.combine_backward(
            buffers.T, d_out.array, experts.out.array, experts.b_out, experts.d_b_out, router.chosen_NK, self._slots_NK,
            router.gates_NK, buffers.router.d_gates_NK, shared.out.array, shared.d_b_out, keys[Site.MLP_OUTPUT],
            *self._drop,
        )  # fmt: skip
        router.backward(share)
        experts.backward(buffers.d_rows, adds=adds)
        shared.backward(buffers.d_shared, adds=adds)
        expert_rows.scatter(
            buffers.d_rows.array, self._slots_NK, buffers.d_shared.array, buffers.router.d_x.array, d_x.array
        )
