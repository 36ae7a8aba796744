"""The router of a mixture of experts, written out; `nanomoe.model.moe.Router` is its reference."""

import numpy as np
import torch

from nanomoe.config import JobConfig
from nanomoe.training.steps.buffers import Buffer, as_array
from nanomoe.training.steps.loops import routing
from nanomoe.training.steps.loops.compiling import Keys
from nanomoe.training.steps.parameters import FlatParameters
from nanomoe.training.steps.team import Team


def _floats(n_rows: int, n_columns: int, team: Team) -> Buffer:
    return Buffer(n_rows, n_columns, torch.float32, team)


class RouterBuffers:
    """What no layer's router keeps, one for all of them: shapes (N, C), (N, K) and (N, E)."""

    def __init__(self, N: int, config: JobConfig, team: Team) -> None:
        self.team = team
        self.d_x = _floats(N, config.n_embd, team)
        self.d_gates_NK = np.zeros((N, config.k), np.float32)
        self.d_logits, self.d_raw = (_floats(N, config.n_experts, team) for _ in range(2))


class Router:
    """Scores every expert for every one of N tokens, in float32 whatever the type of the products."""

    def __init__(
        self, parameters: FlatParameters, name: str, T: int, N: int, config: JobConfig, buffers: RouterBuffers
    ) -> None:
        """`name`: of the module. `T`: tokens of a window."""
        self._config, self._T, self._buffers = config, T, buffers
        E, K = config.n_experts, config.k
        self._weight, self._d_weight = (of[f"{name}.weight"] for of in (parameters.weights, parameters.gradients))
        self._transposed = self._weight.t()
        self._logits = _floats(N, E, buffers.team)
        self._noisy = self._logits
        if config.router_noise:
            noise_weight = f"{name}.noise_weight"
            self._noise_weight, self._d_noise_weight = (
                parameters.weights[noise_weight],
                parameters.gradients[noise_weight],
            )
            self._raw, self._noise, self._noisy = (_floats(N, E, buffers.team) for _ in range(3))
        bias = parameters.constants.get(f"{name}.balance_bias")
        self._bias_E = np.zeros(E, np.float32) if bias is None else as_array(bias)
        self._is_sigmoid = config.router_score == "sigmoid"
        self._scores_NE = np.zeros((N, E), np.float32)
        self._x = _floats(N, config.n_embd, buffers.team)
        """What it read, widened where that is not float32."""
        self.chosen_NK = np.zeros((N, K), np.int64)
        """Each token's experts, the highest score first, ties to the lowest index."""
        self.gates_NK = np.zeros((N, K), np.float32)
        """The weights of their outputs, before any assignment is dropped."""
        self.counts_E = np.zeros(E, np.int64)
        """Assignments to each expert, before any is dropped."""

    def forward(self, x: Buffer, keys_BP2: Keys) -> None:
        """Route `x` (N, C)."""
        if x.tensor.dtype == torch.float32:
            self._x = x
        else:
            self._x.tensor.copy_(x.tensor)
        x = self._x
        torch.mm(x.tensor, self._transposed, out=self._logits.tensor)
        if self._config.router_noise:
            torch.mm(x.tensor, self._noise_weight.t(), out=self._raw.tensor)
            arrays = self._raw.array, self._logits.array, self._noise.array, self._noisy.array
            routing.add_noise(self._T, keys_BP2, *arrays)
        routing.route(
            self._noisy.array, self._is_sigmoid, self._bias_E, self._config.renormalises_gates, self._scores_NE,
            self.chosen_NK, self.gates_NK, self.counts_E,
        )  # fmt: skip

    def backward(self, share: float) -> None:
        """From the gradient of the gates, in the buffers, and of the balance losses to that of `x`, in the buffers."""
        config, buffers, x = self._config, self._buffers, self._x
        N, E = self._scores_NE.shape
        d_logits, d_raw = buffers.d_logits, buffers.d_raw
        # E * sum_e f_e * P_e, with f_e = count / (N * K) and P_e a mean over N tokens.
        balance = config.router_aux_loss_coef * share * E / (N * N * config.k)
        routing.route_backward(
            buffers.d_gates_NK, self.gates_NK, self.chosen_NK, self._scores_NE, self._is_sigmoid,
            config.renormalises_gates, self.counts_E, np.float32(balance), d_logits.array,
        )  # fmt: skip
        if config.router_noise:
            routing.noise_backward(d_logits.array, self._noise.array, self._raw.array, d_raw.array)
        routing.z_backward(self._logits.array, np.float32(config.router_z_loss_coef * share / N), d_logits.array)
        torch.addmm(self._d_weight, d_logits.tensor.t(), x.tensor, out=self._d_weight)
        torch.mm(d_logits.tensor, self._weight, out=buffers.d_x.tensor)
        if config.router_noise:
            torch.addmm(self._d_noise_weight, d_raw.tensor.t(), x.tensor, out=self._d_noise_weight)
            torch.addmm(buffers.d_x.tensor, d_raw.tensor, self._noise_weight, out=buffers.d_x.tensor)
