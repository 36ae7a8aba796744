import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanomoe import checkpoint, importing
from nanomoe.import_messages import ImportRequest
from nanomoe.importing import NotImportable, import_checkpoint, read_model
from tests.nanomoe.foreign_models import BLOCK_SIZE, gpt2, nanogpt_checkpoint, save_gpt2

TEXT = "Era uma vez um gato que dormia no sofá."
TOKENS = torch.arange(BLOCK_SIZE)[None] * 7 % 256


def imported(folder: Path, to: Path, **changes: Any) -> Any:
    request = ImportRequest(**{"files": str(folder), "to": str(to), "text": TEXT, "tokenizer": "bytes"} | changes)
    answer = import_checkpoint(request)
    model, _, _ = checkpoint.load_model(checkpoint.open(to, answer.manifest_sha256))
    return answer, model


def test_a_gpt2_folder_has_the_logits_that_transformers_computes(tmp_path: Path) -> None:
    theirs = gpt2()
    answer, ours = imported(save_gpt2(tmp_path / "files", theirs), tmp_path / "f0-100")
    with torch.no_grad():
        assert (ours(TOKENS).logits_BTV - theirs(TOKENS).logits).abs().max() < 1e-5
    assert answer.metrics["loss"] > 0
    assert answer.warnings == []


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_nanogpt_checkpoint_with_a_padded_vocabulary_has_the_logits_that_transformers_computes(
    tmp_path: Path, prefix: str
) -> None:
    theirs, files = gpt2(vocab_size=320), tmp_path / "files"
    files.mkdir()
    torch.save(nanogpt_checkpoint(theirs, prefix), files / "ckpt.pt")
    with pytest.raises(NotImportable, match="320 entries, the tokenizer 256") as refused:
        imported(files, tmp_path / "f0-100")
    assert refused.value.code == "vocabulary_does_not_fit"

    theirs = gpt2(vocab_size=256 + 128)
    tokenizer = save_tokenizer_of(files, 300)
    torch.save(nanogpt_checkpoint(theirs, prefix), files / "ckpt.pt")
    answer, ours = imported(files, tmp_path / "f0-100", tokenizer="mine")
    with torch.no_grad():
        difference = ours(TOKENS).logits_BTV - theirs(TOKENS).logits[..., :tokenizer]
    assert difference.abs().max() < 1e-5
    assert [warning.code for warning in answer.warnings] == ["vocabulary_cropped"]
    assert answer.origin == "nanoGPT's ckpt.pt of step 2,000"
    assert answer.config["tokenizer"] == "mine"


def save_tokenizer_of(folder: Path, n_entries: int) -> int:
    """Save a byte-level BPE of at most so many entries; returns how many it has."""
    from nanomoe.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(f"train:{n_entries}", text=TEXT * 3 + " O rato roeu a roupa do rei de Roma." * 3)
    tokenizer.save(folder)
    return tokenizer.vocab_size


def test_a_shorter_context_is_the_first_positions(tmp_path: Path) -> None:
    theirs = gpt2()
    folder = save_gpt2(tmp_path / "files", theirs)
    _, ours = imported(folder, tmp_path / "f0-100", block_size=8)
    with torch.no_grad():
        assert (ours(TOKENS[:, :8]).logits_BTV - theirs(TOKENS[:, :8]).logits).abs().max() < 1e-5
    with pytest.raises(NotImportable) as refused:
        imported(folder, tmp_path / "other", block_size=BLOCK_SIZE + 1)
    assert refused.value.code == "block_size_too_large"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("activation_function", "gelu_new"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("n_inner", 10),
        ("model_type", "llama"),
    ],
)
def test_an_option_that_this_model_does_not_compute_is_refused_by_its_name(
    tmp_path: Path, option: str, value: Any
) -> None:
    folder = save_gpt2(tmp_path, gpt2())
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {option: value}))
    with pytest.raises(NotImportable, match=option) as refused:
        read_model(folder)
    assert refused.value.code == "option_not_supported"


def test_a_missing_activation_is_gpt2s_default_which_is_refused(tmp_path: Path) -> None:
    folder = save_gpt2(tmp_path, gpt2())
    config = json.loads((folder / "config.json").read_bytes())
    del config["activation_function"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotImportable, match="'gelu_new'"):
        read_model(folder)


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("tensor_missing", lambda state: state.pop("transformer.h.1.mlp.c_fc.weight")),
        ("tensor_unexpected", lambda state: state.update({"transformer.h.2.x": torch.zeros(1)})),
        ("shape_does_not_fit", lambda state: state.update({"transformer.wpe.weight": torch.zeros(3, 16)})),
        ("weights_not_finite", lambda state: state["transformer.ln_f.bias"].fill_(float("nan"))),
        ("option_not_supported", lambda state: state.update({"lm_head.weight": torch.zeros(256, 16)})),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, code: str, change: Any) -> None:
    folder = save_gpt2(tmp_path, gpt2())
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(NotImportable) as refused:
        read_model(folder)
    assert refused.value.code == code


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    ran, files = tmp_path / "ran", tmp_path / "files"
    files.mkdir()
    torch.save({"model": Evil(ran), "model_args": {}}, files / "ckpt.pt")
    with pytest.raises(NotImportable) as refused:
        read_model(files)
    assert refused.value.code == "pickle_refused"
    (files / "ckpt.pt").write_bytes(pickle.dumps(Evil(ran)))
    with pytest.raises(NotImportable):
        read_model(files)
    assert not ran.exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04" + bytes(100)])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(NotImportable) as refused:
        read_model(tmp_path)
    assert refused.value.code in ("not_a_checkpoint", "pickle_refused")


def test_an_empty_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NotImportable, match="there is nothing"):
        importing.read_model(tmp_path)
