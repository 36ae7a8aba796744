"""The device that a benchmark is told to measure."""

from typing import TYPE_CHECKING

from service.cli.usage_error import UsageError

if TYPE_CHECKING:
    import torch


def device_named(device: str) -> "torch.device":
    """The device of this name.

    Raises:
        UsageError: there is none.
    """
    from nanomoe.training.execution import DeviceUnavailable, find_device

    try:
        return find_device(device)
    except (DeviceUnavailable, RuntimeError) as error:
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from error
