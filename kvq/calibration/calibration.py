"""The statistics of all layers of one model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from kvq.calibration.calibration_file import read_calibration, write_calibration
from kvq.errors import CalibrationError
from kvq.files.model_fingerprint import ModelFingerprint
from kvq.plugin_api.quantizer import Side
from kvq.plugin_api.statistics import LayerStatistics

DIGEST_LENGTH = 16
STANDARD = "standard"
"""The name of the calibration that has the statistics of standard normal states for every layer."""

_MOST_REMEMBERED = 8
Layers = Mapping[tuple[int, Side], LayerStatistics]


class Calibration:
    """Statistics of a model's states, for backends that ask for them; `kvq.calibrate` collects one.

    Two are equal where all their numbers are.

    Args:
        layers: the statistics by layer and side.
        model: what tells the model from others, or None: any model is accepted.
        text: name of the text that was read.
        tokens: number of tokens that were counted.

    Attributes:
        path: the file that it was written to or read from, absolute, or None.
    """

    def __init__(
        self, layers: Layers, *, model: ModelFingerprint | None = None, text: str = "", tokens: int = 0
    ) -> None:
        self._layers = dict(layers)
        self.model = model
        self.text = text
        self.tokens = tokens
        self.path: Path | None = None

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Return what a file holds; nothing in it is executed.

        Raises:
            CalibrationError: the file cannot be read, is damaged, or is something else.
        """
        found = read_calibration(Path(path).expanduser())
        calibration = cls(found.layers, model=found.model, text=found.text, tokens=found.tokens)
        calibration.path = Path(path).expanduser().absolute()
        return calibration

    def save(self, path: str | Path) -> None:
        """Write it to a file, safetensors, atomically.

        Raises:
            CalibrationError: the file cannot be written.
        """
        target = Path(path).expanduser()
        write_calibration(target, self._layers, model=self.model, text=self.text, tokens=self.tokens)
        self.path = target.absolute()

    @property
    def layers(self) -> list[int]:
        """The layers that there are statistics of."""
        return sorted({layer_idx for layer_idx, _ in self._layers})

    @cached_property
    def digest(self) -> str:
        """A fingerprint of all numbers, 16 hexadecimal digits: equal in every file of the same statistics."""
        hasher = hashlib.sha256()
        for (layer_idx, side), own in sorted(self._layers.items()):
            for name, tensor in sorted(_tensors_of(own)):
                hasher.update(f"{layer_idx} {side} {name} {tuple(tensor.shape)}".encode())
                hasher.update(tensor.contiguous().numpy().tobytes())
        return hasher.hexdigest()[:DIGEST_LENGTH]

    def get(self, layer_idx: int, side: Side, num_heads: int, head_dim: int) -> LayerStatistics:
        """Return the statistics of one side of one layer.

        Args:
            layer_idx: index of the layer.
            side: keys or values.
            num_heads: key-value heads that the states have (H).
            head_dim: elements of one head (D).

        Raises:
            CalibrationError: there are none, or they are of states of another shape.
        """
        own = self._layers.get((layer_idx, side))
        if own is None:
            known = f"layers {min(self.layers)} to {max(self.layers)}" if self._layers else "no layer"
            raise CalibrationError(
                f"calibration {self} has no {side}s of layer {layer_idx}, but {known}: it is of another model"
            )
        if own.mean.shape != (num_heads, head_dim):
            there = " x ".join(map(str, own.mean.shape))
            raise CalibrationError(
                f"calibration {self} has {side}s of {there} numbers (heads x head dim) in layer {layer_idx}, and these "
                f"states have {num_heads} x {head_dim}: it is of another model"
            )
        return own

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Calibration) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        return repr(str(self.path)) if self.path is not None else "the one given"

    def __repr__(self) -> str:
        place = f"{str(self.path)!r}, " if self.path is not None else ""
        return f"Calibration({place}{len(self.layers)} layers, {self.tokens:,} tokens, digest {self.digest})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Calibration:
        return self


class StandardCalibration(Calibration):
    """The statistics of standard normal states, for any layer of any model: what a backend knows of nothing."""

    def __init__(self) -> None:
        super().__init__({}, text=STANDARD)

    @cached_property
    def digest(self) -> str:
        """The word by which a configuration names it."""
        return STANDARD

    def get(self, layer_idx: int, side: Side, num_heads: int, head_dim: int) -> LayerStatistics:  # noqa: ARG002
        """Return the statistics of standard normal states of this shape."""
        return _standard_statistics(num_heads, head_dim, side)

    def save(self, path: str | Path) -> None:
        """Refuse: a configuration names it by a word.

        Raises:
            CalibrationError: always.
        """
        raise CalibrationError(f"{str(path)!r} is not needed: write calibration: {STANDARD}")

    def __str__(self) -> str:
        return repr(STANDARD)


@lru_cache(maxsize=_MOST_REMEMBERED)
def _standard_statistics(num_heads: int, head_dim: int, side: Side) -> LayerStatistics:
    """Return one object for all layers, which cost no more memory than one of them then."""
    return LayerStatistics.of_standard_states(num_heads, head_dim, queries=side == "key")


def _tensors_of(own: LayerStatistics) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((name, value) for name, value in vars(own).items() if value is not None)
