"""The passes of an evaluation for several models of one shape at once: their weights stacked, the model mapped over
them (`torch.func.vmap`), each with texts of its own.

What `nanomoe.evaluation.evaluate.measure` gives of one model, `measure_together` gives of each, to the rounding of
batched products. On a GPU that may depend on how many models are stacked; so a pass always has equally many, rows
without a model being copies of the first one, and no model's figures depend on which others there are.

Shape letters: W models (the width), B windows, T tokens of a window, N = B * T, G guesses, C channels, V vocabulary, E
experts, K experts of a token.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from nanomoe.config import JobConfig, SamplingConfig
from nanomoe.data import IGNORE, Windows
from nanomoe.evaluation.evaluate import Measured, continued, windows_of_beginning, windows_without
from nanomoe.evaluation.evaluated_text import EvaluatedText, RaiseIfStopped, go_on
from nanomoe.evaluation.moe_metrics import LayerRouting
from nanomoe.evaluation.reader import LOGITS_BYTES, PlainReader, Reading, evaluating
from nanomoe.generation.continuation import Draft, choose_rows, continue_tokens
from nanomoe.generation.engine import Request
from nanomoe.model.gpt import GPT, token_losses

Each = TypeVar("Each")


@dataclass(frozen=True)
class Evaluated:
    """A model, and what of it is evaluated."""

    model: GPT
    text: EvaluatedText
    val_text: EvaluatedText | None
    config: JobConfig

    @property
    def shape(self) -> tuple[object, ...]:
        """Equal for models of one shape that can be evaluated together: their texts have windows of one length, and as
        many are read of each; as many tokens are added to prompts of one length."""
        texts = [self.text] if self.val_text is None else [self.text, self.val_text]
        n_tokens = self.text.all_windows.n_targets_in_all + 1
        return (
            *((text.all_windows.length, len(text.windows)) for text in texts),
            len(windows_of_beginning(self.text)),
            windows_without(self.text.all_windows, self.config),
            min(self.config.cont_prefix_tokens, n_tokens),
            self.config.cont_max_new_tokens,
        )

    @property
    def tokens_at_once(self) -> int:
        """Tokens that its largest pass reads."""
        reader = PlainReader(self.model)
        texts = [self.text] if self.val_text is None else [self.text, self.val_text]
        n = max(
            min(reader.windows_per_batch(text.all_windows), len(text.windows)) * text.all_windows.length
            for text in texts
        )
        windows = self.text.all_windows
        return max(n, len(windows_without(windows, self.config) or ()) * windows.length)


def models_at_once(one: Evaluated, width: int) -> int:
    """How many models like this one a pass has, `width` at most: as many as hold their activations of a block in
    `BATCH_BYTES`. Where it is 1, company would gain nothing."""
    windows = one.text.all_windows
    whole_batch = PlainReader(one.model).windows_per_batch(windows) * windows.length
    return max(1, min(width, whole_batch // one.tokens_at_once))


def measure_together(
    members: Sequence[Evaluated], width: int, raise_if_stopped: RaiseIfStopped = go_on
) -> list[Measured]:
    """What passes of `width` models say of each of these, as many at most, which have one `shape`. The weights become
    views of stacked ones, with the same numbers. `raise_if_stopped` is called between two passes.

    Raises:
        RuntimeError: memory ran out.
        ValueError: a logit overflows float32.
    """
    models = _StackedModels([one.model for one in members], width)
    texts = [one.text for one in members]
    val_texts = [one.val_text for one in members if one.val_text is not None]
    with torch.no_grad():
        reads = models.read([(text.all_windows, text.windows) for text in texts], raise_if_stopped)
        of_val = models.read([(text.all_windows, text.windows) for text in val_texts], raise_if_stopped)
        val_losses = [read.total / len(read.losses) for read in of_val]
        missing = [(text.all_windows, windows_of_beginning(text)) for text in texts]
        beginnings = models.read(missing, raise_if_stopped) if missing[0][1] else []
        added = _continue(members, models, raise_if_stopped)
        without = windows_without(texts[0].all_windows, members[0].config)
        losses_without: Sequence[dict[int, list[float]] | None] = [None] * len(members)
        if without is not None:
            losses_without = models.losses_without([text.all_windows for text in texts], without, raise_if_stopped)
    norms = models.router_grad_norms([text.all_windows for text in texts])
    return [
        Measured(
            read=reads[n],
            beginning=beginnings[n] if beginnings else None,
            val_loss=val_losses[n] if val_losses else None,
            added=added[n],
            router_grad_norms=norms[n],
            losses_without=losses_without[n],
        )
        for n in range(len(members))
    ]


def _continue(
    members: Sequence[Evaluated], models: "_StackedModels", raise_if_stopped: RaiseIfStopped
) -> list[list[int]]:
    """The new tokens of each member. Where they slide beyond the model's window, they are computed member by member."""
    prompts = [continued(one.text.all_windows.tokens, one.config) for one in members]
    samplings = [SamplingConfig(temperature=one.config.temperature, top_k=one.config.top_k) for one in members]
    n_new = members[0].config.cont_max_new_tokens
    if n_new == 0:
        return [[] for _ in members]
    if len(prompts[0][0]) + n_new > members[0].model.config.block_size:
        return [
            _continue_alone(one, prompt, how, raise_if_stopped)
            for one, (prompt, _), how in zip(members, prompts, samplings, strict=True)
        ]
    drafts = [
        Draft(Request(prompt, n_new, how, one.config.seed), expected)
        for one, (prompt, expected), how in zip(members, prompts, samplings, strict=True)
    ]
    models.finish(drafts, raise_if_stopped)
    return [draft.new for draft in drafts]


def _continue_alone(
    one: Evaluated, prompt: Sequence[int], how: SamplingConfig, raise_if_stopped: RaiseIfStopped
) -> list[int]:
    n_new, seed = one.config.cont_max_new_tokens, one.config.seed
    with evaluating(one.model):
        return continue_tokens(
            one.model, prompt, max_new_tokens=n_new, how=how, seed=seed, before_pass=raise_if_stopped
        )


class _Routed(NamedTuple):
    """What an evaluation needs of a mixture's `Routing`, with a dimension of the models in front."""

    chosen: Tensor
    probs: Tensor
    logits: Tensor


class _StackedModels:
    """Models whose weights are stacked, in evaluation mode."""

    def __init__(self, models: Sequence[GPT], width: int) -> None:
        self._n = len(models)
        self._width = width
        self._device = models[0].transformer.wte.weight.device
        self._vocab_size = models[0].vocab_size
        # Only in training mode does a mixture take the path that it is told: the others wait for the device. Nothing
        # else of the mode matters without dropout, noise and a capacity.
        skeleton = GPT.build(models[0].config.model_copy(update={"capacity_factor": None}), self._vocab_size, "meta")
        for moe in skeleton.train().moe_layers.values():
            moe.path = "masked"
        self._layers = list(skeleton.moe_layers)
        self._hidden_of_one = _Hidden(skeleton)
        self._reader = PlainReader(models[0])
        self._weights = _stacked(models, width)

    def read(
        self, texts: Sequence[tuple[Windows, Sequence[int]]], raise_if_stopped: RaiseIfStopped = go_on
    ) -> list[Reading]:
        """`Reader.read` of each model's windows, equally many of one length."""
        if not texts:
            return []
        windows, n_windows = texts[0][0], len(texts[0][1])
        per_batch = self._reader.windows_per_batch(windows)
        parts: list[list[Reading]] = [[] for _ in texts]
        for first in range(0, n_windows, per_batch):
            raise_if_stopped()
            chosen = [(text, list(all_chosen[first : first + per_batch])) for text, all_chosen in texts]
            for found, part in zip(parts, self._read_batch(chosen), strict=True):
                found.append(part)
        return [_joined(found) for found in parts]

    def _read_batch(self, chosen: Sequence[tuple[Windows, list[int]]]) -> Iterator[Reading]:
        inputs_WBT, targets_WBT = self._batch(chosen)
        hidden_WBTC, routings = self._hidden(inputs_WBT)
        losses: list[Tensor] = []
        predicted: list[Tensor] = []
        for logits_WNV, targets_WN in self._logits_in_blocks(hidden_WBTC, targets_WBT):
            losses.append(token_losses(logits_WNV, targets_WN))
            predicted.append(logits_WNV.argmax(-1))
        losses_WN, predicted_WN = torch.cat(losses, 1), torch.cat(predicted, 1)
        totals = losses_WN.double().sum(1).tolist()
        # One copy of each to the host, and what is a single model's is taken there.
        losses_WN, predicted_WN, real_WN = (
            each.cpu() for each in (losses_WN, predicted_WN, (targets_WBT != IGNORE).flatten(1))
        )
        routed = {layer: _Routed(*(each.cpu() for each in routing)) for layer, routing in routings.items()}
        for n, (windows, own) in enumerate(chosen):
            is_real_N = real_WN[n]
            yield Reading(
                windows=own,
                n_targets=[windows.n_targets([window]) for window in own],
                losses=losses_WN[n][is_real_N].tolist(),
                total=totals[n],
                predicted=predicted_WN[n][is_real_N].tolist(),
                routing={
                    layer: LayerRouting.of_tokens(*(each[n][is_real_N] for each in routing))
                    for layer, routing in routed.items()
                },
            )

    def losses_without(
        self, windows: Sequence[Windows], chosen: Sequence[int], raise_if_stopped: RaiseIfStopped
    ) -> list[dict[int, list[float]]]:
        """`Reader.losses_without` of each model."""
        inputs_WBT, targets_WBT = self._batch([(each, list(chosen)) for each in windows])
        found: list[dict[int, list[float]]] = [{layer: [] for layer in self._layers} for _ in windows]
        for layer in self._layers:
            for expert in range(self._reader.model.config.n_experts):
                raise_if_stopped()
                hidden_WBTC, _ = self._hidden(inputs_WBT, without=(layer, expert))
                blocks = self._logits_in_blocks(hidden_WBTC, targets_WBT)
                losses_WN = torch.cat([token_losses(*block) for block in blocks], 1)
                totals = losses_WN.double().sum(1).tolist()
                for own, each, total in zip(found, windows, totals, strict=False):  # the rest of the rows are nobody's
                    own[layer].append(total / each.n_targets(list(chosen)))
        return found

    def router_grad_norms(self, windows: Sequence[Windows]) -> list[dict[int, float]]:
        """{layer: norm of the gradient} of each model, see `Measured.router_grad_norms`."""
        if not self._layers:
            return [{} for _ in windows]
        names = [f"transformer.h.{layer}.mlp.router.weight" for layer in self._layers]
        routers = {name: self._weights[name].detach().requires_grad_() for name in names}
        inputs_WBT, targets_WBT = self._batch([(each, [0]) for each in windows])
        hidden_WBTC, _ = self._hidden(inputs_WBT, weights=self._weights | routers)
        losses_WN = token_losses(self._logits(hidden_WBTC.flatten(1, 2)), targets_WBT.flatten(1))
        n_targets_W = torch.tensor(self._filled([each.n_targets([0]) for each in windows]), device=self._device)
        gradients = torch.autograd.grad((losses_WN.sum(1) / n_targets_W).sum(), list(routers.values()))
        norms = torch.stack([torch.linalg.vector_norm(gradient, dim=(1, 2)) for gradient in gradients], 1).tolist()
        return [dict(zip(self._layers, own, strict=True)) for own in norms[: self._n]]

    def finish(self, drafts: Sequence[Draft], before_pass: RaiseIfStopped) -> None:
        """Draft until all new tokens of each model are certain; prompts have one length, and equally many tokens are
        added to each."""
        n_new = drafts[0].n_left
        guesses = [draft.guesses() for draft in drafts]
        samplings = self._filled([draft.sampling for draft in drafts])
        uniforms = self._filled([draft.uniforms for draft in drafts])
        while any(draft.n_left for draft in drafts):
            before_pass()
            tokens_WGT = torch.tensor(self._filled(guesses), device=self._device)
            hidden_WGTC, _ = self._hidden(tokens_WGT)
            chosen: list[list[int]] = [[] for _ in samplings]
            positions = torch.arange(Draft.N_GUESSES * n_new, device=self._device).expand(self._width, -1)
            for logits_WNV, places_WN in self._logits_in_blocks(hidden_WGTC[:, :, -n_new:], positions):
                places = places_WN[0].tolist()
                hows = [how for how in samplings for _ in places]
                numbers = [own[place % n_new] for own in uniforms for place in places]
                tokens = choose_rows(logits_WNV.flatten(0, 1), hows, numbers)
                for n, own in enumerate(chosen):
                    own += tokens[n * len(places) : (n + 1) * len(places)]
            for n, draft in enumerate(drafts):
                if n_left := draft.n_left:
                    draft.take([chosen[n][end - n_left : end] for end in range(n_new, len(chosen[n]) + 1, n_new)])
                if draft.n_left:
                    guesses[n] = draft.guesses()

    def _batch(self, chosen: Sequence[tuple[Windows, list[int]]]) -> tuple[Tensor, Tensor]:
        """Inputs and targets (W, B, T) of the windows of each model; rows that are nobody's have those of the first."""
        batches = self._filled([windows.batch(own) for windows, own in chosen])
        inputs, targets = zip(*batches, strict=True)
        return torch.stack(inputs), torch.stack(targets)

    def _filled(self, of_each: Sequence[Each]) -> list[Each]:
        return [*of_each, *[of_each[0]] * (self._width - len(of_each))]

    def _hidden(
        self, tokens_WBT: Tensor, without: tuple[int, int] | None = None, weights: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[int, _Routed]]:
        """What `GPT.hidden` gives, of every model."""

        def of_one(own: Mapping[str, Tensor], tokens_BT: Tensor) -> tuple[Tensor, dict[int, _Routed]]:
            found: tuple[Tensor, dict[int, _Routed]]
            found = functional_call(self._hidden_of_one, dict(own), (tokens_BT, without))
            return found

        whole = {f"model.{name}": tensor for name, tensor in (weights or self._weights).items()}
        of_all: tuple[Tensor, dict[int, _Routed]] = vmap(of_one)(whole, tokens_WBT)
        return of_all

    def _logits(self, hidden_WNC: Tensor) -> Tensor:
        return torch.bmm(hidden_WNC, self._weights["transformer.wte.weight"].transpose(1, 2))

    def _logits_in_blocks(self, hidden_WBTC: Tensor, targets_WBT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (W, n, V) and targets (W, n) of as many tokens of each model at a time as `LOGITS_BYTES` hold."""
        at_once = max(1, LOGITS_BYTES[self._device.type] // (4 * self._vocab_size * self._width))
        hidden, targets = hidden_WBTC.flatten(1, 2).split(at_once, 1), targets_WBT.reshape(self._width, -1)
        for hidden_WNC, targets_WN in zip(hidden, targets.split(at_once, 1), strict=True):
            yield self._logits(hidden_WNC), targets_WN


class _Hidden(nn.Module):
    """The part of a model that is mapped over the models."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BT: Tensor, without: tuple[int, int] | None) -> tuple[Tensor, dict[int, _Routed]]:
        hidden_BTC, routings = self.model.hidden(tokens_BT, without=without)
        return hidden_BTC, {
            layer: _Routed(routing.chosen_TK, routing.probs_TE, routing.logits_TE)
            for layer, routing in routings.items()
        }


def _stacked(models: Sequence[GPT], width: int) -> dict[str, Tensor]:
    """Every weight and buffer of all models (W, ...), by its name in a model. The models' own become views of them, so
    that their memory is given back weight by weight."""
    owns = [dict(chain(model.named_parameters(), model.named_buffers())) for model in models]
    stacked = {}
    for name in owns[0]:
        rows = [own[name].data for own in owns]
        stacked[name] = torch.stack([*rows, *rows[:1] * (width - len(rows))])
        for own, row in zip(owns, stacked[name], strict=False):  # the rest of the rows are nobody's
            own[name].data = row
    return stacked


def _joined(parts: Sequence[Reading]) -> Reading:
    """The batches of a text, one after the other."""
    total = 0.0
    for part in parts:
        total += part.total
    return Reading(
        windows=[window for part in parts for window in part.windows],
        n_targets=[n for part in parts for n in part.n_targets],
        losses=[loss for part in parts for loss in part.losses],
        total=total,
        predicted=[token for part in parts for token in part.predicted],
        routing={layer: LayerRouting.join([part.routing[layer] for part in parts]) for layer in parts[0].routing},
    )
