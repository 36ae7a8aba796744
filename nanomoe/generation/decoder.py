"""How a step is computed: tokens of many sequences through all layers, with cached keys and values.

Two ways: `CompiledDecoder` in compiled loops on a CPU, and `TensorDecoder` in tensor operations, which are the model's
own modules beside a cache. In both a sequence's arithmetic depends on its own tokens alone: in loops the order of every
sum is written down; on a CPU tensor operations are done for one sequence at a time; on a GPU the single tokens of all
rows of the cache are computed in one shape, whether a row is in use or not. The two may differ from each other in the
last bits.

Shape letters: N sequences, T tokens of each, R rows of the cache, L cached positions, B = block_size, C channels,
H heads, D = C / H. Knows no sampling and no requests.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from nanomoe.config import ModelConfig
from nanomoe.model.gpt import GPT, MLP


class Span(NamedTuple):
    """Tokens of one sequence."""

    row: int
    """The sequence's row of the cache."""

    start: int
    """Position of the first token. What the row holds before is seen; what it held from there on is replaced."""

    tokens: Sequence[int]
    """Token ids, at least one; the last position is below block_size."""


class Decoder(Protocol):
    """What computes a step."""

    @property
    def numerics(self) -> str:
        """How a step is computed, in words."""

    @property
    def n_bytes(self) -> int:
        """Memory of the weights and the cache."""

    @property
    def row_bytes(self) -> int:
        """Memory of one cached sequence."""

    def step(self, spans: Sequence[Span]) -> Tensor:
        """(N, C): the hidden state, after the last norm, of the last token of each span. No row stands in two."""


class CompiledDecoder:
    """A step in compiled loops, on a CPU."""

    numerics = "compiled loops"

    def __init__(self, weights: Mapping[str, Tensor], config: ModelConfig) -> None:
        """`weights`: float32, by nanoGPT's names."""
        from nanomoe.generation.kernels.step import Loops

        self._loops = Loops(weights, config)

    @property
    def n_bytes(self) -> int:
        """Memory of the weights and the cache."""
        return self._loops.n_bytes

    @property
    def row_bytes(self) -> int:
        """Memory of one cached sequence."""
        return self._loops.row_bytes

    def step(self, spans: Sequence[Span]) -> Tensor:
        """(N, C): hidden states, see `Decoder`."""
        return torch.from_numpy(self._loops.step(spans))


class TensorDecoder:
    """A step in tensor operations."""

    numerics = "tensor operations"

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        config: ModelConfig,
        device: torch.device,
        n_rows: int,
        *,
        in_one_shape: bool,
    ) -> None:
        """`weights`: float32, on the device, by nanoGPT's names. `n_rows`: most sequences that are cached.
        `in_one_shape`: whether the single tokens of all rows are computed together."""
        vocab_size = len(weights["transformer.wte.weight"])
        with torch.device("meta"):
            self._model = GPT(config, vocab_size).eval()
        self._model.load_state_dict(dict(weights), assign=True)
        self.config = config
        self.device = device
        self._in_one_shape = in_one_shape
        self._n_rows = n_rows
        self._positions_B = torch.arange(config.block_size, device=device)
        self._keys, self._values = self._new_cache(n_rows if in_one_shape else 1)

    def _new_cache(self, n_rows: int) -> Tensor:
        """(2, layers, R, B, H, D). Zeros, not empty: what a mask hides is still multiplied, and 0 * NaN is NaN."""
        config = self.config
        H = config.n_head
        shape = (2, config.n_layer, n_rows, config.block_size, H, config.n_embd // H)
        return torch.zeros(shape, device=self.device)

    @property
    def n_bytes(self) -> int:
        """Memory of the weights and the cache."""
        return sum(tensor.nbytes for tensor in (*self._model.state_dict().values(), self._keys, self._values))

    @property
    def row_bytes(self) -> int:
        """Memory of one cached sequence."""
        return row_bytes(self.config)

    def step(self, spans: Sequence[Span]) -> Tensor:
        """(N, C): hidden states, see `Decoder`."""
        self._reserve(1 + max(span.row for span in spans))
        singles = [span for span in spans if len(span.tokens) == 1] if self._in_one_shape else []
        found: dict[int, Tensor] = {}
        if singles:
            tokens_R, positions_R = [0] * self._n_rows, [0] * self._n_rows
            for span in singles:
                tokens_R[span.row], positions_R[span.row] = span.tokens[0], span.start
            hidden_RC = self.advance(torch.tensor([tokens_R, positions_R], device=self.device))
            found = {span.row: hidden_RC[span.row] for span in singles}
        # After the single tokens, which write something to the first position of every other row.
        for span in spans:
            if span.row not in found:
                tokens_1T = torch.tensor([span.tokens], device=self.device)
                end = span.start + len(span.tokens)
                positions_1T = self._positions_B[None, span.start : end]
                found[span.row] = self._forward(tokens_1T, positions_1T, slice(span.row, span.row + 1), end)[0]
        return torch.stack([found[span.row] for span in spans])

    def _reserve(self, n_rows: int) -> None:
        before = self._keys.shape[1]
        if n_rows > before:
            grown = self._new_cache(min(self._n_rows, 1 << (n_rows - 1).bit_length()))
            grown[0, :, :before], grown[1, :, :before] = self._keys, self._values
            self._keys, self._values = grown

    def advance(self, newest_2R: Tensor) -> Tensor:
        """(R, C): the hidden states of one token for every row of the cache, given with its position."""
        tokens_R1, positions_R1 = newest_2R[0, :, None], newest_2R[1, :, None]
        return self._forward(tokens_R1, positions_R1, slice(0, self._n_rows), self.config.block_size)

    def _forward(self, tokens_NT: Tensor, positions_NT: Tensor, rows: slice, length: int) -> Tensor:
        """(N, C): hidden states of the last tokens, which see the first `length` positions of their rows up to their
        own."""
        N, T = tokens_NT.shape
        H, C = self.config.n_head, self.config.n_embd
        parts = self._model.transformer
        x_NTC = parts.wte(tokens_NT) + parts.wpe(positions_NT)
        seen_N1TL = (self._positions_B[:length] <= positions_NT[..., None])[:, None]
        places = torch.arange(N, device=self.device)[:, None], positions_NT
        for block, keys, values in zip(self._model.blocks, self._keys, self._values, strict=True):
            queries, new_keys, new_values = block.attn.c_attn(block.ln_1(x_NTC)).view(N, T, 3, H, C // H).unbind(2)
            keys_NBHD, values_NBHD = keys[rows], values[rows]
            keys_NBHD.index_put_(places, new_keys)
            values_NBHD.index_put_(places, new_values)
            attended_NHTD = F.scaled_dot_product_attention(
                queries.transpose(1, 2),
                keys_NBHD[:, :length].transpose(1, 2),
                values_NBHD[:, :length].transpose(1, 2),
                attn_mask=seen_N1TL,
            )
            x_NTC = x_NTC + block.attn.c_proj(attended_NHTD.transpose(1, 2).reshape(N, T, C))
            normed = block.ln_2(x_NTC)
            x_NTC = x_NTC + (block.mlp(normed, None) if isinstance(block.mlp, MLP) else block.mlp(normed)[0])
        hidden_NC: Tensor = parts.ln_f(x_NTC[:, -1])
        return hidden_NC


def row_bytes(config: ModelConfig) -> int:
    """Memory of one sequence that tensor operations cache: keys and values in float32."""
    return 4 * 2 * config.n_layer * config.block_size * config.n_embd
