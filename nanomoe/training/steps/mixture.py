"""A mixture of experts in place of an MLP, written out; `nanomoe.model.moe` is its reference.

Each token's row is copied to those of its experts, which lie one below the other, expert by expert; an expert's
products take just its rows, and one without any does nothing. Capacity, balance and counts are those of the whole
micro-batch, so that one thread routes it; then each takes some of the experts whole.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanomoe.config import JobConfig
from nanomoe.model.dropout import Site
from nanomoe.model.moe import expert_capacity
from nanomoe.training.steps.buffers import Buffer
from nanomoe.training.steps.experts import Experts
from nanomoe.training.steps.feed_forward import Drop, FeedForward
from nanomoe.training.steps.loops import expert_rows, routing
from nanomoe.training.steps.loops.compiling import Keys
from nanomoe.training.steps.parameters import FlatParameters
from nanomoe.training.steps.router import Router, RouterBuffers
from nanomoe.training.steps.team import Team

_KEEPS_ALL: Drop = np.uint32(0), np.float32(1)


class MixtureBuffers:
    """What no layer's mixture keeps, one for all of them. A rows of chosen experts, S * N of shared ones."""

    def __init__(self, T: int, N: int, config: JobConfig, dtype: torch.dtype, team: Team) -> None:
        """`T`: tokens of a window; `N`: of the micro-batch. `dtype`: type of the products."""
        A, SN, C, F = N * config.k, N * config.n_shared_experts, config.n_embd, config.expert_hidden
        self.T, self.N, self.A, self.dtype, self.team = T, N, A, dtype, team
        self.d_rows, self.d_shared = Buffer(A, C, dtype, team), Buffer(SN, C, dtype, team)
        self.wide, self.shared_wide = Buffer(A, F, dtype, team), Buffer(SN, F, dtype, team)
        self.router = RouterBuffers(N, config, team)


class _Task(NamedTuple):
    """One expert's part of a pass, which a thread does whole: its bits do not depend on how many threads there are."""

    expert: int
    rows: slice
    is_shared: bool


class MixtureFeedForward(FeedForward):
    """Router and experts over N rows."""

    def __init__(
        self, parameters: FlatParameters, name: str, config: JobConfig, drop: Drop, buffers: MixtureBuffers
    ) -> None:
        """`name`: of the module. `drop`: of each expert's output."""
        T, N, A, E, K, C = buffers.T, buffers.N, buffers.A, config.n_experts, config.k, config.n_embd
        self._team = team = buffers.team
        self.bias, self.d_bias = np.zeros(C, np.float32), [np.zeros(C, np.float32) for _ in range(team.n_threads)]
        self.drop = _KEEPS_ALL
        self._drop, self._buffers = drop, buffers
        self._router = Router(parameters, f"{name}.router", T, N, config, buffers.router)
        factor = config.capacity_factor
        self._capacity = A if factor is None else expert_capacity(factor, N, K, E)
        self._rows = Buffer(A, C, buffers.dtype, team)
        self._experts = Experts(parameters, f"{name}.experts", E, C, buffers.wide, team)
        self._starts_E1, self._tokens_A = np.zeros(E + 1, np.int64), np.zeros(A, np.int64)
        self._slots_NK = np.zeros((N, K), np.int64)
        self._n_shared = config.n_shared_experts
        self._shared = Experts(parameters, f"{name}.shared", self._n_shared, C, buffers.shared_wide, team)
        self._x = self._rows
        """What `forward` read."""
        self._tasks: list[list[_Task]] = []
        """By thread."""

    @property
    def counts(self) -> Tensor:
        """int64: the micro-batch's assignments to each expert, before any is dropped."""
        return torch.from_numpy(self._router.counts_E.copy())

    @property
    def dropped(self) -> Tensor:
        """int64, one number: the micro-batch's assignments beyond the capacity."""
        return torch.tensor(self._buffers.A - int(self._starts_E1[-1]))

    def forward(self, thread: int, x: Buffer, keys: Keys, out: Buffer) -> None:
        experts, shared = self._experts, self._shared
        self._team.wait(thread)
        if thread == 0:
            self._route(x, keys[Site.ROUTER_NOISE])
        self._team.wait(thread)
        for expert, rows, is_shared in self._tasks[thread]:
            if is_shared:
                shared.forward(expert, rows, x.tensor)
            else:
                expert_rows.gather(rows.start, rows.stop, x.array, self._tokens_A, self._rows.array)
                experts.forward(expert, rows, self._rows.tensor[rows])
        self._team.wait(thread)
        rows = self._team.share(self._buffers.N, thread)
        expert_rows.combine(
            rows.start, rows.stop, self._buffers.T, experts.out.array, experts.b_out, self._router.chosen_NK,
            self._slots_NK, self._router.gates_NK, shared.out.array, shared.b_out, keys[Site.MLP_OUTPUT], *self._drop,
            out.array,
        )  # fmt: skip

    def backward(self, thread: int, keys: Keys, d_out: Buffer, d_x: Buffer, share: float, *, adds: bool) -> None:
        router, experts, shared, buffers = self._router, self._experts, self._shared, self._buffers
        of_thread = self._team.share(buffers.N, thread)
        expert_rows.combine_backward(
            of_thread.start, of_thread.stop, buffers.T, d_out.array, experts.out.array, experts.b_out,
            experts.d_b_out[thread], router.chosen_NK, self._slots_NK, router.gates_NK, buffers.router.d_gates_NK,
            shared.out.array, shared.d_b_out[thread], keys[Site.MLP_OUTPUT], *self._drop,
        )  # fmt: skip
        self._team.wait(thread)
        if thread == 0:
            router.backward(share)
        for expert, rows, is_shared in self._tasks[thread]:
            if is_shared:
                d_rows = buffers.d_shared.tensor[rows]
                shared.backward(thread, expert, rows, self._x.tensor, d_rows, adds=adds)
            else:
                x, d_rows = self._rows.tensor[rows], buffers.d_rows.tensor[rows]
                experts.backward(thread, expert, rows, x, d_rows, adds=adds)
        self._team.wait(thread)
        expert_rows.scatter(
            of_thread.start, of_thread.stop, buffers.d_rows.array, self._slots_NK, buffers.d_shared.array,
            buffers.router.d_x.array, d_x.array,
        )  # fmt: skip

    def add_gradients(self, thread: int, x: Buffer, d_out: Buffer, *, adds: bool) -> None:
        """Nothing: an expert has all of its rows in `backward`."""

    def _route(self, x: Buffer, keys_BP2: Keys) -> None:
        """Choose the experts of all rows, and the thread of each expert."""
        self._x = x
        self._router.forward(x, keys_BP2)
        routing.assign(
            self._router.chosen_NK, self._router.counts_E, self._capacity, self._starts_E1, self._slots_NK,
            self._tokens_A,
        )  # fmt: skip
        N, starts = self._buffers.N, self._starts_E1.tolist()
        tasks = [_Task(e, slice(*bounds), False) for e, bounds in enumerate(pairwise(starts))]
        tasks += [_Task(s, slice(s * N, (s + 1) * N), True) for s in range(self._n_shared)]
        self._tasks = self._team.distribute(tasks, lambda task: task.rows.stop - task.rows.start)
