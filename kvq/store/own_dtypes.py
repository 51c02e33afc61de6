"""Keep the store's arithmetic in its own dtypes when the model runs under autocast.

Autocast is about the model's arithmetic. It would round the factors in a quantizer to half precision, so the stored
blocks would depend on where a flush happened to fall, and on processors it concatenates no float16.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which operations on a device have the dtypes of their operands."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
