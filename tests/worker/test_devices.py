"""Finding devices without torch."""

import pytest

from service.errors import StartRefused
from worker.devices import find_devices, parse_gpus

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
