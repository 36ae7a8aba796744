"""The optimizer steps of several models of one shape as one program: their weights stacked, a pass there and back for
all of them, one update.

A member's step goes to its lane (`Lane`), which only takes down what is to be done; once all have, `advance` does it
for all. A step is a replay of a graph for each micro-batch and of one for the update, as in
`nanomoe.training.steps.captured`, and the model is that of `nanomoe.model.gpt`, mapped over the members
(`torch.func.vmap`). What differs between members lies on the device, a number or row for each: windows and the keys of
their dropout, dropout itself, learning rate, AdamW's settings, clipping, the text.

Micro-batches have equally many windows for all: where a member has fewer, the others are padding, of which all targets
are ignored. Whatever one member computes, the others' numbers do not change; but on a GPU they depend on how many
models are stacked, so a program keeps its width: lanes whose member has left, or that never had one, go on idle.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from nanomoe.config import JobConfig
from nanomoe.cuda_graphs import Graphs, Program
from nanomoe.data import IGNORE, Windows
from nanomoe.evaluation.evaluated_text import EvaluatedText
from nanomoe.evaluation.reader import PlainReader
from nanomoe.model.dropout import Dropout, Rate, new_counters
from nanomoe.model.gpt import GPT, token_losses
from nanomoe.model.moe import MoE, Routing, shift_balance_bias
from nanomoe.training.early_stopping import EndingRule
from nanomoe.training.memory import is_out_of_memory
from nanomoe.training.steps.agenda import Agenda, empty_rows, read_rows
from nanomoe.training.steps.eager import balanced
from nanomoe.training.steps.ending import CapturedEnding
from nanomoe.training.steps.stacked_parameters import StackedParameters
from nanomoe.training.steps.step import MOST_UNREAD, CaptureFailed, Figures, Part, Planned, TrainingStep

T = TypeVar("T")


class _Routed(NamedTuple):
    """What a step needs of a mixture's `Routing`; of one model, or with a dimension in front of all."""

    aux_loss: Tensor
    z_loss: Tensor
    counts_E: Tensor
    dropped: Tensor


class StackedSteps:
    """The program, and a lane for each of its members.

    Shape letters, also name suffixes: W models (the width), P numbers of a model's parameters; others as in
    `nanomoe.model.gpt` and `nanomoe.model.moe`.
    """

    def __init__(
        self,
        members: Sequence[tuple[GPT, Windows, JobConfig]],
        activations: torch.dtype,
        graphs: Graphs,
        width: int | None = None,
    ) -> None:
        """The members' models, whose weights become views of one buffer, their texts and configs; all of one shape, see
        `nanomoe.cohort_shape`. `width`: models that the program has, as many as members by default.

        Raises:
            RuntimeError: memory ran out.
            CaptureFailed: the step cannot be captured.
        """
        models, texts, configs = zip(*members, strict=True)
        width = width or len(members)
        self._graphs = graphs
        self._activations = activations
        self._device = device = texts[0].device
        self.parameters = StackedParameters(models, configs, width, device)
        self._texts = _Texts(texts, width)
        # All have masks, those of a model that drops nothing keep everything: attention is computed in another way
        # without, and nobody's bits may depend on what others drop.
        self._config = configs[0].model_copy(update={"dropout": 0.5})
        rates = [Rate.of(config.dropout) for config in configs] + [Rate.of(0.0)] * (width - len(members))
        self._rates = Rate(
            torch.tensor([rate.cut for rate in rates], device=device),
            torch.tensor([rate.scale for rate in rates], device=device),
        )
        self._skeleton = GPT.build(self._config, models[0].vocab_size, "meta").train()
        for moe in self._skeleton.moe_layers.values():
            moe.path = "masked"
        self._hidden_of_one = _Hidden(self._skeleton)
        self._layers = list(self._skeleton.moe_layers)
        self.is_skipped_W = torch.ones(width, device=device)
        """Where it is 1 and not 0, steps change nothing."""
        self._loss_W, self._norm_W, self._lr_W = (torch.zeros(width, device=device) for _ in range(3))
        self._counts_LWE = self._zeros(len(self._layers), width, self._config.n_experts)
        """Assignments to each expert of each mixture in the step so far, before dropping."""
        self.dropped_LW = self._zeros(len(self._layers), width)
        """Assignments beyond the capacity, in all steps since whoever reads them has set them to 0."""
        self._figures = torch.zeros(2 * MOST_UNREAD, width, 2, device=device)
        """A ring: each step's losses and norms."""
        self._next_figures = self._zeros(1)
        self._n_updates = 0
        self._copy: dict[str, Tensor] | None = None
        """All weights since the last step, where anybody has asked for them."""
        most_windows = max(min(config.batch_size, text.count) for text, config in zip(texts, configs, strict=True))
        self._micro_batches = max(map(_micro_batches, texts, configs))
        self._rows = empty_rows(most_windows, device).repeat(width, 1, 1)
        self._cursor_W = self._zeros(width)
        self._lanes_W = torch.arange(width, device=device)
        self.lanes = [self._lane(place, *member) for place, member in enumerate(members)]
        """The lane of each member, in their order."""
        self._first = self._captured(lambda: self._capture_gradient(is_first=True))
        self._further = None
        if self._micro_batches > 1:
            self._further = self._captured(lambda: self._capture_gradient(is_first=False))
        self._update = self._captured(self._capture_update)
        self.is_skipped_W[: len(members)] = 0

    @property
    def width(self) -> int:
        """Models that are computed together, those of idle lanes among them."""
        return len(self.is_skipped_W)

    def advance(self) -> None:
        """Do the step that every lane has taken down; lanes whose member has left are idle."""
        self._copy = None
        self._first.replay()
        if self._further is not None:
            for _ in range(1, self._micro_batches):
                self._further.replay()
        self._update.replay()
        self._graphs.limit_lead()
        self._n_updates += 1

    def figures(self, place: int) -> Figures:
        """Those of a lane in the step that `advance` is going to do."""
        loss, norm = self._figures[self._n_updates % len(self._figures), place]
        return Figures(loss, norm)

    def copy(self, place: int) -> dict[str, Tensor]:
        """A copy of the weights and buffers of a lane's model, by their names. All who ask between two steps share one:
        the copies of many models are no more launches than that of one."""
        self._copy = self._copy or self.parameters.copy()
        return {name: of_all[place] for name, of_all in self._copy.items()}

    def _lane(self, place: int, model: GPT, windows: Windows, config: JobConfig) -> "Lane":
        agenda = Agenda(
            windows, config.seed, self._rows[place], self._cursor_W[place : place + 1], rows_a_step=self._micro_batches
        )
        dropped = {layer: self.dropped_LW[n, place] for n, layer in enumerate(self._layers)}
        return Lane(self, place, agenda, config, dropped)

    def ending(
        self,
        place: int,
        rule: EndingRule,
        reader: PlainReader,
        text: EvaluatedText,
        val_text: EvaluatedText | None,
    ) -> CapturedEnding:
        """What decides on the device whether a member's training ends early, see `CapturedEnding`."""
        return CapturedEnding(rule, reader, text, val_text, self._graphs, self.is_skipped_W[place])

    def _captured(self, capture: Callable[[], T]) -> T:
        try:
            return capture()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            if error.__context__ is not None and is_out_of_memory(error.__context__):
                raise error.__context__ from None
            raise CaptureFailed(f"the steps could not be captured as CUDA graphs: {error}") from error

    def _capture_gradient(self, *, is_first: bool) -> Program:
        leaves = self.parameters.leaves()

        def work() -> None:
            row = read_rows(self._rows[self._lanes_W, self._cursor_W])
            # A member that has left reads on: the rows are those of whatever it was to do, and nobody reads the result.
            self._cursor_W.add_(1).remainder_(self._rows.shape[1])
            self._lr_W.copy_(row.lr)
            inputs_WBT, targets_WBT = self._texts.gather(row.windows_B, row.n_windows)
            n_tokens_W = row.n_windows * self._texts.lengths_W if self._layers else None
            hidden_WBTC, routings = self._hidden(leaves, inputs_WBT, row.keys_B, n_tokens_W)
            losses_NT = token_losses(self._logits(leaves, hidden_WBTC), targets_WBT.flatten(0, 1))
            losses_W = losses_NT.view_as(targets_WBT).sum((1, 2)) / row.n_targets.float()
            objective_W = balanced(losses_W, routings, self._config, row.share)
            gradients = torch.autograd.grad(objective_W.sum(), list(leaves.values()))
            with torch.no_grad():
                is_done_W = (1 - self.is_skipped_W).long()
                self.parameters.take(gradients, adds=not is_first)
                self._loss_W.copy_(losses_W if is_first else self._loss_W + losses_W)
                for n, routed in enumerate(routings.values()):
                    if is_first:
                        self._counts_LWE[n].copy_(routed.counts_E)
                    else:
                        self._counts_LWE[n].add_(routed.counts_E)
                    self.dropped_LW[n].add_(routed.dropped * is_done_W)

        changed = [*self.parameters.gradients, self._loss_W, self._counts_LWE, self.dropped_LW, self._cursor_W]
        return self._graphs.capture(work, changed, is_warm=not is_first)

    def _hidden(
        self, leaves: Mapping[str, Tensor], inputs_WBT: Tensor, keys_WB: Tensor, n_tokens_W: Tensor | None
    ) -> tuple[Tensor, dict[int, _Routed]]:
        """What `GPT.hidden` gives, of every model: hidden states, and the routing of each mixture."""

        def of_one(
            weights: Mapping[str, Tensor], inputs_BT: Tensor, keys_B: Tensor, rate: Rate, n_tokens: Tensor | None
        ) -> tuple[Tensor, dict[int, _Routed]]:
            dropout = Dropout.of_window_keys(
                self._config, keys_B, dtype=self._activations, counters=new_counters, rate=rate
            )
            hidden_BTC, routings = functional_call(self._hidden_of_one, dict(weights), (inputs_BT, dropout, n_tokens))
            return hidden_BTC, {
                layer: _Routed(routing.aux_loss, routing.z_loss, routing.counts_E, routing.dropped)
                for layer, routing in routings.items()
            }

        weights = {f"model.{name}": leaf for name, leaf in (dict(leaves) | self.parameters.buffers).items()}
        with self._autocast():
            found: tuple[Tensor, dict[int, _Routed]]
            found = vmap(of_one, in_dims=(0, 0, 0, 0, None if n_tokens_W is None else 0))(
                weights, inputs_WBT, keys_WB, self._rates, n_tokens_W
            )
        return found

    def _logits(self, leaves: Mapping[str, Tensor], hidden_WBTC: Tensor) -> Tensor:
        """(W * B, T, V): the output layers, one product of a batch."""
        embeddings_WVC = leaves["transformer.wte.weight"]
        with self._autocast():
            logits = torch.bmm(hidden_WBTC.flatten(1, 2), embeddings_WVC.transpose(1, 2))
        return logits.view(-1, hidden_WBTC.shape[2], logits.shape[-1])

    def _autocast(self) -> AbstractContextManager[object]:
        if self._activations == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._activations, cache_enabled=False)

    def _capture_update(self) -> Program:
        def work() -> None:
            self.parameters.update(self._loss_W, self._lr_W, self._norm_W, self.is_skipped_W)
            figures = torch.stack([self._loss_W, self._norm_W], -1)
            self._figures.index_copy_(0, self._next_figures, figures[None])
            self._next_figures.add_(1).remainder_(len(self._figures))
            is_done_W1 = (1 - self.is_skipped_W).long()[:, None]
            for n, layer in enumerate(self._layers):
                bias_WE = self.parameters.balance_bias(layer)
                if bias_WE is not None:
                    shift_balance_bias(bias_WE, self._counts_LWE[n] * is_done_W1, self._config.router_bias_update_rate)

        return self._graphs.capture(work, [*self.parameters.gradients, self._next_figures])

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self._device)


class _Hidden(nn.Module):
    """The part of a model that is mapped over the members."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, inputs_BT: Tensor, dropout: Dropout, n_tokens: Tensor | None
    ) -> tuple[Tensor, dict[int, Routing]]:
        return self.model.hidden(inputs_BT, dropout=dropout, n_tokens=n_tokens)


class _Texts:
    """The members' texts, one below the other."""

    def __init__(self, texts: Sequence[Windows], width: int) -> None:
        """Idle rows have the first one."""
        device = texts[0].device
        texts = [*texts, *[texts[0]] * (width - len(texts))]
        self._length = max(text.length for text in texts)
        self.lengths_W = torch.tensor([text.length for text in texts], device=device)
        """Tokens of a window: fewer than others have where the text is shorter than a window."""
        self._n_tokens_W1 = torch.tensor([[len(text.padded_tokens) - 1] for text in texts], device=device)
        most = max(len(text.padded_tokens) for text in texts)
        self._tokens_WN = torch.full((width, most), IGNORE, device=device)
        for row, text in zip(self._tokens_WN, texts, strict=True):
            row[: len(text.padded_tokens)].copy_(text.padded_tokens)
        self._offsets_T = torch.arange(self._length, device=device)

    def gather(self, windows_WB: Tensor, n_windows_W: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets (W, B, T), int64, as `Windows.gather` gives them; targets are ignored in the windows after
        the first `n_windows_W`, and behind the end of a short text, where inputs are any token."""
        firsts_WB = windows_WB * self._length
        last_W1 = (self._n_tokens_W1 - 1 - self._length).clamp(min=0)
        positions_WBT = torch.minimum(firsts_WB, last_W1)[..., None] + self._offsets_T
        inputs_WBT, targets_WBT = (
            self._tokens_WN.gather(1, (positions_WBT + shift).flatten(1)).view_as(positions_WBT) for shift in (0, 1)
        )
        is_padding_WB = torch.arange(windows_WB.shape[1], device=windows_WB.device) >= n_windows_W[:, None]
        is_ignored_WBT = (positions_WBT < firsts_WB[..., None]) | is_padding_WB[..., None]
        return inputs_WBT.clamp(min=0), targets_WBT.masked_fill(is_ignored_WBT, IGNORE)


def _micro_batches(text: Windows, config: JobConfig) -> int:
    """The most micro-batches of a step."""
    return min(config.gradient_accumulation_steps, -(-text.count // config.batch_size))


class Lane(TrainingStep):
    """A member's steps, which the program does: nothing of them has begun when `update` returns, and `advance` has to
    come before anybody looks at the weights."""

    def __init__(
        self, program: StackedSteps, place: int, agenda: Agenda, config: JobConfig, dropped: dict[int, Tensor]
    ) -> None:
        self.program = program
        self._place = place
        self._agenda = agenda
        self._planned = Planned([], config.lr)
        self._index = self._n_targets = 0
        self.dropped = dropped
        """By mixture, 0-dim int64: assignments beyond the capacity since whoever reads them has set them to 0."""
        self.lr = config.lr
        self.has_left = False
        """Whether its member is gone, and the program goes on without it."""

    def begin(self) -> None:
        self._planned = Planned([], self.lr)

    def add(self, index: int, windows: Sequence[int], n_targets: int) -> Part:
        """See `TrainingStep`; counts are the program's own."""
        self._index, self._n_targets = index, n_targets
        self._planned.micro_batches.append(list(windows))
        return Part(self.program.figures(self._place).loss, {}, {})

    def update(self) -> Figures:
        self._agenda.prepare_step(self._index, self._planned, self._n_targets)
        return self.program.figures(self._place)

    def leave(self) -> None:
        """The member is gone: nothing of its row changes any more."""
        self.program.is_skipped_W[self._place] = 1
        self.has_left = True

    def frozen(self) -> dict[str, Tensor]:
        """A copy of the weights and buffers of the model as they are, by their names."""
        return self.program.copy(self._place)

    def look_ahead(self, plan: Callable[[int], Planned | None]) -> None:
        self._agenda.plan = plan

    def ending(
        self, rule: EndingRule, reader: PlainReader, text: EvaluatedText, val_text: EvaluatedText | None
    ) -> CapturedEnding:
        """What decides on the device whether training ends early, and then turns later steps into ones that change
        nothing."""
        return self.program.ending(self._place, rule, reader, text, val_text)

    def balance(self, moe_layers: Mapping[int, MoE], counts: Mapping[int, Tensor]) -> None:
        """Do nothing: the program does it."""

    def tensors(self) -> dict[str, Tensor]:
        return self.program.parameters.tensors(self._place)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.program.parameters.load(self._place, tensors)
