"""Which kernels are compiled on this machine, and compiling them while jobs train without them.

Triton compiles a kernel when it is first launched, a second or so each, and keeps the result on disk. No job waits for
that: a job whose kernels have not been compiled does its steps without them, to its end, and a process of the lowest
priority compiles them beside it, by one step of a throw-away model. Imports no Triton.
"""

import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from nanomoe.config import JobConfig

_PACKAGE = Path(__file__).parent
_SOURCES = [*sorted(_PACKAGE.glob("*.py")), _PACKAGE.parents[2] / "model" / "dropout.py"]


def not_installed_because() -> str | None:
    """Why there can be no kernels; None where Triton is installed."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


@functools.cache
def compiled_for() -> str:
    """The compiler, and the SHA-256 of the kernels' sources, shortened: with others a step may round otherwise."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:16]
    try:
        return f"triton {version('triton')}, kernels {digest}"
    except PackageNotFoundError:  # on the path, but not installed by pip
        return f"triton, kernels {digest}"


class KernelVariant:
    """What decides into which variants the kernels of a job are compiled."""

    def __init__(self, config: JobConfig, length: int, dtype: torch.dtype, device_name: str) -> None:
        """`length`: tokens of a window; `dtype`: type of activations and products."""
        self._config = config
        self._length = length
        self._dtype = dtype
        self._device_name = device_name

    @property
    def mark(self) -> Path:
        """The file that says that they are compiled."""
        config = self._config
        of_router = (
            config.n_experts, config.router_score, config.renormalises_gates, config.router_noise,
            config.router_bias_update_rate > 0,
        )  # fmt: skip
        decisive = (
            compiled_for(), self._device_name, str(self._dtype), config.n_embd, config.n_head, config.bias,
            config.dropout > 0, config.use_moe and of_router, self._length, config.betas,
        )  # fmt: skip
        digest = hashlib.sha256(repr(decisive).encode()).hexdigest()[:16]
        return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache") / f"nanomoe-{digest}"

    def not_compiled_because(self) -> str | None:
        """Why a job does without the kernels that starts now; None where they are compiled."""
        if reason := not_installed_because():
            return reason
        return None if self.mark.exists() else "the kernels of such a model are not compiled for this GPU yet"

    def mark_compiled(self) -> None:
        """Note that every kernel has been compiled."""
        self.mark.parent.mkdir(parents=True, exist_ok=True)
        self.mark.touch()

    def command(self, device: str) -> list[str]:
        """The process that compiles them on `device`, and ends with this one."""
        dtype = str(self._dtype).removeprefix("torch.")
        options = [str(os.getpid()), device, str(self._length), dtype, self._config.model_dump_json()]
        return [sys.executable, "-m", "nanomoe.training.steps.kernels", *options]


class KernelCompiler:
    """Has kernels compiled while jobs train without them: one process at a time, and each variant once."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._tried: set[Path] = set()

    def start(self, variant: KernelVariant, device: str) -> bool:
        """Start compiling, unless that was done or a process is at it; whether it was started. The calling thread must
        stay: the process ends with it."""
        is_busy = self._process is not None and self._process.poll() is None
        if is_busy or variant.mark in self._tried or not_installed_because():
            return False
        self._tried.add(variant.mark)
        self._process = subprocess.Popen(  # noqa: S603 - our own command
            variant.command(device), stdin=subprocess.DEVNULL, start_new_session=True
        )
        return True
