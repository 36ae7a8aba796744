"""The loops of a mixture's router, there and back, all in float32; `nanomoe.model.moe.Router` says the same in tensors.

Shape letters beside those of this package: E experts, K experts per token, A = N * K assignments.
"""

import math

import numpy as np
import numpy.typing as npt

from nanomoe.compiling import Floats
from nanomoe.training.steps.loops.compiling import Keys, compiled, compiled_in_any_order
from nanomoe.training.steps.loops.elements import exp, hashed, ordered, unordered

Integers = npt.NDArray[np.int64]

_ZERO = np.float32(0)
_ONE = np.float32(1)
_TWO = np.float32(2)
_SIGN = np.uint32(0x80000000)
_LINEAR = 20.0
"""From where on torch takes softplus(x) as x."""


@compiled
def _uniform(low: np.uint32, high: np.uint32, row: int, word: int) -> float:
    return (np.float64(np.uint32(hashed(low, high, row, word) ^ _SIGN)) + 0.5) / 2.0**32


@compiled
def add_noise(T: int, keys_BP2: Keys, raw_NE: Floats, logits_NE: Floats, noise_NE: Floats, noisy_NE: Floats) -> None:
    """noisy = logits + noise * softplus(raw), the noise standard normal (Shazeer et al., arXiv 1701.06538, eq. 4)."""
    N, E = logits_NE.shape
    for b in range(N // T):
        low, high = keys_BP2[b, 0, 0], keys_BP2[b, 0, 1]
        for t in range(T):
            row = b * T + t
            for e in range(E):
                radius = math.sqrt(-2.0 * math.log(_uniform(low, high, t, 2 * e)))
                noise = np.float32(radius * math.cos(2.0 * math.pi * _uniform(low, high, t, 2 * e + 1)))
                raw = np.float64(raw_NE[row, e])
                size = raw if raw > _LINEAR else math.log1p(math.exp(raw))
                noise_NE[row, e] = noise
                noisy_NE[row, e] = logits_NE[row, e] + noise * np.float32(size)


@compiled
def _choose(row: int, scores_NE: Floats, bias_E: Floats, chosen_NK: Integers, wanted_K: Floats) -> None:
    """The K largest of a row of scores plus bias, the largest first, ties to the lowest index."""
    K = chosen_NK.shape[1]
    for e in range(scores_NE.shape[1]):
        wanted = scores_NE[row, e] + bias_E[e]
        n = min(e, K)
        if n == K and not wanted > wanted_K[K - 1]:
            continue
        place = min(n, K - 1)
        while place > 0 and wanted > wanted_K[place - 1]:
            wanted_K[place] = wanted_K[place - 1]
            chosen_NK[row, place] = chosen_NK[row, place - 1]
            place -= 1
        wanted_K[place] = wanted
        chosen_NK[row, place] = e


@compiled_in_any_order
def route(
    logits_NE: Floats, is_sigmoid: bool, bias_E: Floats, renormalises: bool, scores_NE: Floats, chosen_NK: Integers,
    gates_NK: Floats, counts_E: Integers,
) -> None:  # fmt: skip
    """From logits to scores, each token's experts, their gates, and the assignments to each expert."""
    N, E = logits_NE.shape
    K = chosen_NK.shape[1]
    wanted_K = np.empty(K, np.float32)
    counts_E[:] = 0
    for row in range(N):
        if is_sigmoid:
            for e in range(E):
                scores_NE[row, e] = _ONE / (_ONE + exp(-logits_NE[row, e]))
        else:
            _softmax(row, logits_NE, scores_NE)
        _choose(row, scores_NE, bias_E, chosen_NK, wanted_K)
        total = _ZERO
        for j in range(K):
            gates_NK[row, j] = scores_NE[row, chosen_NK[row, j]]
            total += gates_NK[row, j]
            counts_E[chosen_NK[row, j]] += 1
        if renormalises:
            for j in range(K):
                gates_NK[row, j] /= total


@compiled_in_any_order
def _softmax(row: int, logits_NE: Floats, out_NE: Floats) -> np.float32:
    """The softmax of a row; the logarithm of the sum of its exponentials."""
    E = logits_NE.shape[1]
    key = ordered(logits_NE[row, 0])
    for e in range(1, E):
        key = max(key, ordered(logits_NE[row, e]))
    largest, total = unordered(key), _ZERO
    for e in range(E):
        exponential = exp(logits_NE[row, e] - largest)
        out_NE[row, e] = exponential
        total += exponential
    for e in range(E):
        out_NE[row, e] /= total
    return np.float32(largest + np.float32(np.log(total)))


@compiled
def assign(
    chosen_NK: Integers, counts_E: Integers, capacity: int, starts_E1: Integers, slots_NK: Integers, tokens_A: Integers
) -> int:
    """Sort the assignments by expert, in flattened token order within one; each expert takes at most `capacity`.

    Expert e's rows are those from `starts[e]` to `starts[e + 1]`; `tokens` says whose each row is; `slots` is the row
    of an assignment, -1 where it is dropped. The number of rows is returned.
    """
    N, K = chosen_NK.shape
    E = len(counts_E)
    starts_E1[0] = 0
    for e in range(E):
        starts_E1[e + 1] = starts_E1[e] + min(counts_E[e], capacity)
    next_E = starts_E1[:E].copy()
    for row in range(N):
        for j in range(K):
            expert = chosen_NK[row, j]
            slot = next_E[expert]
            if slot < starts_E1[expert + 1]:
                tokens_A[slot] = row
                next_E[expert] += 1
            else:
                slot = -1
            slots_NK[row, j] = slot
    return int(starts_E1[E])


@compiled_in_any_order
def route_backward(
    d_gates_NK: Floats, gates_NK: Floats, chosen_NK: Integers, scores_NE: Floats, is_sigmoid: bool, renormalises: bool,
    counts_E: Integers, balance: np.float32, d_logits_NE: Floats,
) -> None:  # fmt: skip
    """From the gradient of the gates to that of the logits that they were chosen by.

    `balance` times an expert's count is the gradient of the balance loss at each token's probability of that expert.
    """
    N, E = scores_NE.shape
    K = chosen_NK.shape[1]
    d_probability_E, d_score_E = np.empty(E, np.float32), np.empty(E, np.float32)
    for e in range(E):
        d_probability_E[e] = balance * np.float32(counts_E[e])
    for row in range(N):
        for e in range(E):
            d_score_E[e] = _ZERO
        total, along = _ONE, _ZERO
        if renormalises:
            total = _ZERO
            for j in range(K):
                total += scores_NE[row, chosen_NK[row, j]]
                along += d_gates_NK[row, j] * gates_NK[row, j]
        for j in range(K):
            d_score_E[chosen_NK[row, j]] = (d_gates_NK[row, j] - along) / total
        along = _ZERO
        if is_sigmoid:
            # Of sigmoid scores the probabilities are the shares of their sum.
            total = _ZERO
            for e in range(E):
                total += scores_NE[row, e]
                along += d_probability_E[e] * scores_NE[row, e]
            along /= total
            for e in range(E):
                score = scores_NE[row, e]
                d_score = d_score_E[e] + (d_probability_E[e] - along) / total
                d_logits_NE[row, e] = d_score * score * (_ONE - score)
        else:
            for e in range(E):
                d_score_E[e] += d_probability_E[e]
                along += d_score_E[e] * scores_NE[row, e]
            for e in range(E):
                d_logits_NE[row, e] = scores_NE[row, e] * (d_score_E[e] - along)


@compiled_in_any_order
def noise_backward(d_noisy_NE: Floats, noise_NE: Floats, raw_NE: Floats, d_raw_NE: Floats) -> None:
    """Through the softplus of `add_noise`."""
    N, E = raw_NE.shape
    for row in range(N):
        for e in range(E):
            d_raw_NE[row, e] = d_noisy_NE[row, e] * noise_NE[row, e] / (_ONE + exp(-raw_NE[row, e]))


@compiled_in_any_order
def z_backward(logits_NE: Floats, factor: np.float32, d_logits_NE: Floats) -> None:
    """Add the gradient of `factor` times the sum over tokens of logsumexp(logits)^2."""
    N, E = logits_NE.shape
    softmax_1E = np.empty((1, E), np.float32)
    for row in range(N):
        size = _TWO * factor * _softmax(0, logits_NE[row : row + 1], softmax_1E)
        for e in range(E):
            d_logits_NE[row, e] += size * softmax_1E[0, e]
