"""Keys and values to look at: tensors whose writes are refused.

A quantized layer decodes its `keys` at every reading, so a write to them would be lost without a word. So it is
refused, also through a slice or another view. Everything else works as on any tensor, and gives plain tensors. Code
that takes the storage itself (`untyped_storage`, `as_subclass`) writes to a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NoReturn

import torch

from kvq.errors import CacheStateError

_IN_PLACE_OPERATORS = frozenset(
    f"__i{name}__"
    for name in "add,sub,mul,truediv,floordiv,mod,pow,matmul,and,or,xor,lshift,rshift".split(",")  # noqa: SIM905
)
_WRITES_NO_DATA = frozenset({"requires_grad_", "detach_", "share_memory_", "rename_"})
"""Operations in place, by their name, that leave the elements as they are."""
_TARGETS = ("input", "self", "tensor")
"""What functions call the argument that they write to."""
_NO_STATES = (int, float, bool, torch.Size, torch.dtype, torch.device, str)
_GET_BASE = torch.Tensor._base.__get__  # type: ignore[union-attr]  # a descriptor of C
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]  # a descriptor of C

_untraced = partial(torch.compiler.disable, recursive=False)
"""Leaves a function out of the graphs of torch.compile, which in torch 2.6 make no subclass; costs nothing else."""


class ReadStates(torch.Tensor):
    """Keys or values of a layer, in full precision, to read."""

    source: str
    """Which states these are, for the refusal."""

    def __dlpack__(self, *_args: Any, **_options: Any) -> NoReturn:
        """Refuse to lend the memory, which the borrower may write to."""
        raise CacheStateError(_refusal(self.source, "__dlpack__"))

    @staticmethod
    @_untraced
    def of(states: torch.Tensor, source: str) -> ReadStates:
        """Return a tensor with the storage of `states`, which should be nobody else's."""
        shown: ReadStates = states.as_subclass(ReadStates)
        shown.source = source
        return shown

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation that only reads.

        Raises:
            CacheStateError: the operation would write, which the cache would never see.
        """
        del types
        options = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            name = getattr(func, "__name__", str(func))
            if name != "__get__":
                for written in _find_written(func, name, args, options):
                    if isinstance(written, ReadStates):
                        raise CacheStateError(_refusal(written.source, name))
            result = func(*args, **options)
            if isinstance(result, _NO_STATES) or func == _GET_BASE:  # which torch.compile follows to its end
                return result
            origins = [one for one in (*args, *options.values()) if isinstance(one, ReadStates)]
            return _guard_views(result, origins) if origins else result

    def __copy__(self) -> ReadStates:
        """Return a tensor with the same storage."""
        shown: ReadStates = ReadStates.of(self._plain(), self.source)
        return shown

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Return a plain copy of the states."""
        copied = copy.deepcopy(self._plain(), memo)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the plain states."""
        return self._plain().__reduce_ex__(protocol)

    def _plain(self) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor)


def _find_written(
    func: Callable[..., Any], name: str, args: tuple[Any, ...], options: Mapping[str, Any]
) -> Iterator[Any]:
    """Yield what an operation writes to, as its schema says, and else as torch names its functions."""
    schema = getattr(func, "_schema", None)
    if schema is not None:
        for place, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from _each(args[place] if place < len(args) else options.get(argument.name))
        return
    in_place = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_OPERATORS
    if (in_place and name not in _WRITES_NO_DATA) or name == "__setitem__" or options.get("inplace"):
        yield from _each(args[0] if args else next((options[name] for name in _TARGETS if name in options), None))
    elif name == "__set__" and func == _SET_DATA:
        yield args[0]
    if "out" in options:
        yield from _each(options["out"])


def _each(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        yield from value
    else:
        yield value


@_untraced
def _guard_views(result: Any, origins: list[ReadStates]) -> Any:
    """Return a result in which all that shares the storage of one of its origins is guarded like it."""
    if type(result) in (list, tuple):
        return type(result)(_guard_views(one, origins) for one in result)
    if type(result) is torch.Tensor and result.layout is torch.strided:
        place = result.untyped_storage()._cdata
        origin = next((one for one in origins if one.untyped_storage()._cdata == place), None)
        return result if origin is None else ReadStates.of(result, origin.source)
    if hasattr(result, "setflags"):  # an array of numpy, which shares the storage too
        result.setflags(write=False)
    return result


def _refusal(source: str, name: str) -> str:
    return (
        f"{name} writes to {source}, which are held quantized: what reads as a tensor is a copy, and the write would "
        "be lost. Take cache.materialize(layer_idx), or a clone(), for a tensor of your own; the cache itself changes "
        "by update, crop, evict and assignment, and a layer with layers={index: {'full_precision': True}} can be "
        "written to"
    )
