"""Values that do not change: the base of the configuration's models, and the mapping that they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from kvq.config.faults import as_kvq_error, find_faults

K = TypeVar("K")
V = TypeVar("V")
Model = TypeVar("Model", bound="FrozenModel")


class FrozenDict(dict[K, V]):
    """A dict that refuses every change; equal to any dict with the same items."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a configuration cannot be changed; build another one with `config.replace(...)`")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type[FrozenDict[K, V]], tuple[dict[K, V]]]:
        return type(self), (dict(self),)


def freeze(value: Any) -> Any:
    """Return `value` with every mapping in it made a `FrozenDict` and every list a tuple."""
    if isinstance(value, Mapping):
        return FrozenDict({key: freeze(item) for key, item in value.items()})
    return tuple(freeze(item) for item in value) if isinstance(value, (list, tuple)) else value


class FrozenModel(BaseModel):
    """A frozen model that knows all its keys and raises kvq's own errors.

    Raises:
        ConfigError: something is wrong; it lists every fault, not only the first.
        BackendError: the only fault is that a backend is unavailable.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, validate_default=True)

    def __init__(self, /, **fields: Any) -> None:
        self._fill(fields)

    def _fill(self, fields: Mapping[str, Any], source: str | None = None) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            refused = as_kvq_error(find_faults(error, fields, self._known_names()), source)
            raise refused from (refused.__cause__ or error)

    @classmethod
    def _known_names(cls) -> list[str]:
        """Return the keys that an error about an unknown one proposes."""
        return list(cls.model_fields)

    def __deepcopy__(self: Model, memo: dict[int, Any] | None = None) -> Model:
        # The values of a configuration are frozen too, and a `BackendSpec` among them need not be copyable.
        return self.__copy__()
