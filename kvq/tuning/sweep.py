"""Any grid of configurations as caches to be measured side by side: what a new quantizer is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from kvq.config import KVQCacheConfig
from kvq.errors import ConfigError, EvaluationError, KVQError
from kvq.evaluation.quality.candidates import Candidate, make_candidate
from kvq.tuning.search_space import Grid
from kvq.tuning.side_setting import Pair, SideSetting, build_config

DEFAULT_BITS = (4, 3, 2)


@dataclass(frozen=True)
class SweepGrid:
    """A grid of configurations: keys and values have the same backend, granularity, group size and steps.

    Attributes:
        sides: the settings of a side; its bits are those of the keys.
        bits_v: bits of the values.
        windows: newest tokens kept exact.
        base: what holds for all configurations.
    """

    sides: Grid
    bits_v: Sequence[float]
    windows: Sequence[int]
    base: KVQCacheConfig

    def candidates(self) -> tuple[list[Candidate], list[str]]:
        """Return the caches, and why others were left out.

        A cache that fails while it is measured is left out as well, with its reason in its record.

        Raises:
            EvaluationError: nothing is left.
            BackendError: a backend is unavailable.
        """
        found: dict[str, Candidate] = {}
        left_out = dict.fromkeys(self.sides.list_lacks())
        for key, bits, window in product(self.sides.settings(), self.bits_v, self.windows):
            pair = Pair(key, replace(key, nbits=bits))
            try:
                config = build_config(self.base.replace(residual_length=window), {0: pair}, 1)
            except KVQError as error:
                left_out[_explain(key.backend, error)] = None
                continue
            label = self._name(key, bits, window)
            found[label] = replace(make_candidate(label, config), may_fail=True)
        if not found:
            raise EvaluationError(f"the grid has no configuration: {'; '.join(left_out)}")
        return list(found.values()), list(left_out)

    def _name(self, key: SideSetting, bits: float, window: int) -> str:
        """Return a name with what differs within the grid."""
        sides = self.sides
        words = [key.backend, f"K{key.nbits:g}V{bits:g}"]
        words += [key.axis.removeprefix("per_")] if len(sides.axes) > 1 else []
        words += [f"g{key.group_size}"] if len(sides.group_sizes) > 1 else []
        words += [f"rotation {key.rotation}"] if len(sides.rotations) > 1 else []
        words += [f"balance {key.balance}"] if len(sides.balances) > 1 else []
        words += [f"clip {key.clip}"] if len(sides.clips or ()) > 1 else []
        words += [f"metadata {key.metadata}"] if len(sides.metadata) > 1 else []
        words += [f"w{window}"] if len(self.windows) > 1 else []
        return " ".join(words)


def _explain(backend: str, error: KVQError) -> str:
    """Return the first fault in one line."""
    fault = error.faults[0] if isinstance(error, ConfigError) and error.faults else error
    return f"{backend}: {fault}".splitlines()[0]
