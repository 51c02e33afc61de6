"""Numbers that are worked out once, when kvq is imported, and looked up on the device where they are needed."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Table:
    """fp32 numbers `[N]`, the same on every device.

    Args:
        numbers: any iterable of floats.

    Attributes:
        numbers: on the processor.
    """

    def __init__(self, numbers: Iterable[float]) -> None:
        # By name: the caller may have set another default device or dtype.
        with torch.inference_mode(False):
            self.numbers = torch.tensor(list(numbers), dtype=torch.float32, device="cpu")
        self._by_device: dict[torch.device, torch.Tensor] = {}

    def on(self, device: torch.device) -> torch.Tensor:
        """Return the numbers on a device, copied there at the first call."""
        if device.type == "cpu":
            return self.numbers
        if device not in self._by_device:
            with torch.inference_mode(False):
                self._by_device[device] = self.numbers.to(device)
        return self._by_device[device]
