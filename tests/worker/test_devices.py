"""Finding devices without torch, and what a trainer is told of its own."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.errors import StartRefused
from service.settings import Settings
from worker.devices import Device, find_devices, parse_gpus
from worker.slot import Slot
from worker.timing import Timing

LISTING = """\
0, GPU-aaaa, NVIDIA H100 80GB HBM3, 81559
1, GPU-bbbb, NVIDIA H100 80GB HBM3, 81559
2, GPU-cccc, NVIDIA A10, 23028
"""


@pytest.mark.parametrize(
    ("visible", "identities"),
    [
        (None, ["GPU-aaaa", "GPU-bbbb", "GPU-cccc"]),
        ("2,0", ["GPU-cccc", "GPU-aaaa"]),
        ("GPU-bb", ["GPU-bbbb"]),
        ("", []),
    ],
)
def test_the_gpus_are_those_that_cuda_would_show(visible: str | None, identities: list[str]) -> None:
    found = parse_gpus(LISTING, visible)
    assert [device.identity for device in found] == identities
    assert [device.name for device in found] == [f"cuda:{n}" for n in range(len(found))]


def test_a_trainer_sees_its_own_gpu_alone() -> None:
    device = parse_gpus(LISTING, None)[2]
    assert device.environment(slots=1)["CUDA_VISIBLE_DEVICES"] == "GPU-cccc"
    assert device.torch_name == "cuda"
    assert device.row == {"device": "cuda:2", "name": "NVIDIA A10", "memory_bytes": 23028 * 2**20}


def test_devices_on_the_cpu_have_locks_of_their_own() -> None:
    first, second = find_devices("cpu:0, cpu:1")
    assert first.identity != second.identity
    assert (first.torch_name, second.torch_name) == ("cpu", "cpu")
    assert first.environment(slots=1)["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("wanted", ["tpu", "cpu,cpu", "cpu:x", "cuda:99", "", "cpu,"])
def test_an_unavailable_device_is_refused_at_start(wanted: str) -> None:
    with pytest.raises(StartRefused, match="device"):
        find_devices(wanted)


@pytest.mark.parametrize(
    ("device", "cohort", "told"),
    [
        (Device("cpu", "x86_64", 2**34, "host-cpu"), "auto", ["--measure-cohort"]),
        (Device("cpu", "x86_64", 2**34, "host-cpu"), 4, []),
        (Device("cuda:0", "NVIDIA H200", 2**37, "GPU-1"), "auto", ["--gpu", "NVIDIA H200", "--measure-cohort"]),
        (Device("cuda:0", "NVIDIA H200", 2**37, "GPU-1"), 4, ["--gpu", "NVIDIA H200"]),
    ],
)
def test_a_trainer_is_told_its_gpus_name_and_whether_to_measure_company(
    device: Device, cohort: Any, told: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[list[str]] = []

    def start(command: list[str], environment: dict[str, str], until: float) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(send=lambda _: None)

    monkeypatch.setattr("worker.slot.TrainerProcess", start)
    settings = Settings(cohort=cohort, data_dir=tmp_path, lock_dir=tmp_path)
    slot = Slot(
        SimpleNamespace(),  # type: ignore[arg-type]
        SimpleNamespace(),  # type: ignore[arg-type]
        device,
        0,
        slots=1,
        settings=settings,
        timing=Timing(),
        command=["trainer"],
        draining=threading.Event(),
        force_stop=threading.Event(),
    )
    slot.supervise()
    ((program, parent, _, until, _, *options),) = commands
    assert (program, parent, until, options) == ("trainer", "--parent", "--until", told)
