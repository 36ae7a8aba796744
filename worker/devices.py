"""The devices that a worker trains on, found without torch: their names, and the environment of a trainer on each."""

import os
import platform
import subprocess
from dataclasses import dataclass
from typing import Any

from service.errors import StartRefused


@dataclass(frozen=True)
class Device:
    """A GPU, or the CPU, that trainers run on."""

    name: str
    """`cpu`, `cpu:N` (another trainer on the same processors) or `cuda:N`."""

    model: str
    memory_bytes: int
    identity: str
    """Id of the device, the same for every worker of this machine: a GPU's UUID, or the host's name for the CPU."""

    @property
    def is_gpu(self) -> bool:
        return self.name.startswith("cuda")

    @property
    def torch_name(self) -> str:
        """The device's name in the trainer's process, which sees only its own GPU."""
        return "cuda" if self.is_gpu else "cpu"

    @property
    def row(self) -> dict[str, Any]:
        """The device as the workers' table holds it."""
        return {"device": self.name, "name": self.model, "memory_bytes": self.memory_bytes}

    def environment(self, slots: int) -> dict[str, str]:
        """The environment of a trainer on this device, which `slots` trainers share."""
        environment = dict(os.environ)
        if self.is_gpu:
            environment["CUDA_VISIBLE_DEVICES"] = self.identity
            # A job that is to be deterministic needs it, and cuBLAS reads it once in a process.
            environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        else:
            environment["CUDA_VISIBLE_DEVICES"] = ""
            if slots > 1:
                environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // slots)))
        return environment


def find_devices(wanted: str) -> list[Device]:
    """The devices that `wanted` names: `auto` (the first GPU, else the CPU), or several of `cpu`, `cpu:N`, `cuda`,
    `cuda:N` with commas between.

    Raises StartRefused when one is not there.
    """
    gpus = _gpus()
    if wanted == "auto":
        return [gpus[0] if gpus else _cpu("cpu")]
    found: list[Device] = []
    for name in (part.strip() for part in wanted.split(",")):
        kind, _, index = name.partition(":")
        if kind == "cpu" and (index.isdecimal() or name == "cpu"):
            found.append(_cpu(name))
        elif kind == "cuda" and (index.isdecimal() or name == "cuda"):
            if int(index or 0) >= len(gpus):
                raise StartRefused(f"device {name} was asked for; nvidia-smi shows {len(gpus)} GPUs here")
            found.append(gpus[int(index or 0)])
        else:
            raise StartRefused(f"device {name!r} is none of auto, cpu, cpu:N, cuda, cuda:N")
    if len({device.name for device in found}) < len(found):
        raise StartRefused(f"{wanted!r} names a device twice; --slots sets how many jobs share one")
    return found


def _cpu(name: str) -> Device:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    identity = f"{platform.node()}-{name.replace(':', '-')}"
    return Device(name, platform.processor() or platform.machine(), memory, identity)


def _gpus() -> list[Device]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; without it, all that nvidia-smi lists."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout  # noqa: S603
    except (FileNotFoundError, subprocess.SubprocessError):
        return []
    return parse_gpus(listing, os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_gpus(listing: str, visible: str | None) -> list[Device]:
    """The devices of nvidia-smi's listing (index, uuid, name, MiB), chosen and ordered by `CUDA_VISIBLE_DEVICES`."""
    rows = [[field.strip() for field in line.split(",")] for line in listing.splitlines() if line.strip()]
    chosen = rows
    if visible is not None:
        wanted = [part.strip() for part in visible.split(",") if part.strip()]
        chosen = [row for part in wanted for row in rows if part == row[0] or row[1].startswith(part)]
    return [Device(f"cuda:{n}", model, int(mib) * 2**20, uuid) for n, (_index, uuid, model, mib) in enumerate(chosen)]
