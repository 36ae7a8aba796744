"""The models that are measured: the reference run's, and its twin with a mixture of experts."""

import json
from importlib.resources import files

from nanomoe.config import JobConfig
from nanomoe.model.gpt import GPT
from nanomoe.tokenizer import BUNDLED, Tokenizer, load_tokenizer
from nanomoe.training.run import prepare

MODELS = {
    "dense": JobConfig(),
    "mixture": JobConfig(use_moe=True, n_experts=8, k=2, expert_hidden_ratio=2.0),
}
"""A token meets as many parameters of one as of the other."""

_STEPS = 60
_LR = 1e-3


def tokenizer_of(vocab_size: int) -> Tokenizer:
    """The bundled tokenizer, with entries added that no text is encoded to: `vocab_size` of them in all."""
    bundled = load_tokenizer(BUNDLED)
    definition = json.loads(bundled.definition)
    entries = definition["model"]["vocab"]
    for token in range(len(entries), vocab_size):
        entries[f"<{token}>"] = token
    return Tokenizer(f"{BUNDLED} and {vocab_size - bundled.vocab_size} more", json.dumps(definition))


def paragraph() -> str:
    """The bundled example text."""
    return files("nanomoe").joinpath("assets", "paragraph.pt.txt").read_text(encoding="utf-8").strip()


def trained(name: str, tokenizer: Tokenizer) -> GPT:
    """One of `MODELS` after 60 steps on the bundled paragraph, as far as those who use it soon are; the same weights at
    every call on one machine."""
    config = MODELS[name].model_copy(update={"lr": _LR})
    run = prepare(config, paragraph(), tokenizer, path="eager").run
    for _ in range(_STEPS):
        run.train_step()
    return run.model.eval()


def untrained(name: str, vocab_size: int) -> GPT:
    """One of `MODELS` at its initial weights."""
    model = GPT.build(MODELS[name], vocab_size)
    model.init_weights(0)
    return model.eval()
