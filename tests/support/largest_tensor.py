"""How large a tensor an operation makes: a history in full precision shows."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest tensor that an operation returns with storage of its own.

    Handles of a cache have no storage, and are left out.
    """

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {arg.untyped_storage().data_ptr() for arg in args if _is_plain(arg)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if _is_plain(tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, tensor.numel())
        return result


def _is_plain(value):
    return type(value) in (torch.Tensor, torch.nn.Parameter)
