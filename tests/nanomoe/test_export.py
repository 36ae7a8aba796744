import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from nanomoe import checkpoint
from nanomoe.config import JobConfig
from nanomoe.export import NotExportable, export_hf, gpt2_model
from nanomoe.model.gpt import GPT
from nanomoe.tokenizer import load_tokenizer

# Run where nanomoe cannot be imported: the exported folders have to be enough.
OPEN_AND_COMPARE = """
import importlib.util, sys
from pathlib import Path

repository, *folders = map(Path, sys.argv[1:])
# An editable install puts the repository on the path: take it off.
sys.path = [entry for entry in sys.path if Path(entry).resolve() != repository]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
assert importlib.util.find_spec("nanomoe") is None

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    assert tokenizer("o rato roeu")["input_ids"] == list(b"o rato roeu")
    known = load_file(folder / "known.safetensors")
    with torch.no_grad():
        logits = model(known["tokens"]).logits
    added = model.generate(known["tokens"][:, :3], max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert added.shape == (1, 11)
    print("opened", type(model).__name__, (logits - known["logits"]).abs().max().item())
"""


def written(tmp_path: Path, config: JobConfig) -> Path:
    """A checkpoint's folder with random weights, and beside it the logits of some tokens.

    Weights and biases are so large that another activation, or a bias that is left out, shows.
    """
    tokenizer = load_tokenizer("bytes")
    model = GPT.build(config, tokenizer.vocab_size)
    model.init_weights(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    for name, buffer in model.named_buffers():
        assert name.endswith("balance_bias")
        buffer.copy_(torch.linspace(-0.3, 0.3, len(buffer)))
    files = {
        checkpoint.WEIGHTS: save(dict(model.state_dict())),
        checkpoint.CONFIG: checkpoint.to_json(config.model_dump(mode="json")),
        **tokenizer.files(),
    }
    checkpoint.write(tmp_path / "f1-100", files)
    tokens = torch.tensor([list(b"o rato roeu")])
    with torch.no_grad():
        logits = model.eval()(tokens).logits_BTV
    save_file({"tokens": tokens, "logits": logits.contiguous()}, tmp_path / "known.safetensors")
    return tmp_path / "f1-100"


SMALL = {"tokenizer": "bytes", "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16}
MOE = {"use_moe": True, "n_experts": 4}


def test_exported_folders_open_without_nanomoe_and_give_the_same_logits(tmp_path: Path) -> None:
    configs = {
        "dense": {},
        "dense-no-bias": {"bias": False},
        "mixture": MOE,
        "mixture-no-bias": MOE | {"moe_stride": 1, "n_shared_experts": 1, "bias": False, "k": 1},
        "mixture-sigmoid": MOE | {"router_score": "sigmoid", "router_bias_update_rate": 0.1, "router_noise": True},
    }
    folders = [tmp_path / name for name in configs]
    for folder, config in zip(folders, configs.values(), strict=True):
        folder.mkdir()
        export_hf(checkpoint.open(written(folder, JobConfig.model_validate(SMALL | config)), None), folder / "hf")
    repository = Path(__file__).resolve().parents[2]
    opened = subprocess.run(
        [sys.executable, "-I", "-c", OPEN_AND_COMPARE, str(repository), *map(str, folders)],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert opened.returncode == 0, opened.stderr
    lines = re.findall(r"opened (\w+) (\S+)", opened.stdout)
    assert [name for name, _ in lines] == ["GPT2LMHeadModel"] * 2 + ["NanoMoEForCausalLM"] * 3
    assert all(float(difference) < 1e-4 for _, difference in lines)


def test_a_mixture_is_no_gpt2(tmp_path: Path) -> None:
    folder = written(tmp_path, JobConfig.model_validate(SMALL | MOE))
    with pytest.raises(NotExportable, match="no mixture"):
        gpt2_model(load_file(folder / checkpoint.WEIGHTS), checkpoint.open(folder, None).config())
