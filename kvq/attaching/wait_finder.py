"""Whether code makes the host wait for a device, found before a capture that would fail of it.

A capture that fails leaves torch's random generator and allocator in the middle of it. It must not know what is
captured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from kvq.errors import CacheStateError

WAITING = frozenset(
    ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_consecutive",
     "aten::unique_dim", "aten::bincount", "aten::equal", "aten::is_nonzero")
)  # fmt: skip
"""Operations whose result the host waits for: a number, or a shape that depends on numbers."""
INDEXING = frozenset(("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"))
"""The host counts what a boolean index chooses."""
COPYING = frozenset(("aten::copy_", "aten::_to_copy"))


class WaitFinder(TorchDispatchMode):
    """Within it, in this thread, an operation that waits for a device raises an error.

    Args:
        device_type: the type of the device.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.device_type = device_type

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation.

        Raises:
            CacheStateError: it waits.
        """
        del types
        name, options = func._schema.name, dict(kwargs or {})
        given = [one for one in tree_iter((args, options)) if isinstance(one, torch.Tensor)]
        there = [one for one in given if one.device.type == self.device_type]
        chooses = name in INDEXING and any(one.dtype in (torch.bool, torch.uint8) for one in there[1:])
        if there and (name in WAITING or chooses):
            raise CacheStateError(f"the model waits for the device: {name}")
        result = func(*args, **options)
        if name in COPYING and any(_differ(one, result) for one in given):
            raise CacheStateError(f"the model copies from one device to another: {name}")
        return result


def _differ(one: torch.Tensor, other: Any) -> bool:
    return isinstance(other, torch.Tensor) and one.device != other.device
