"""The container: a safetensors file whose every byte is covered by a checksum.

Owns bytes, offsets and dtypes; it must not know what the tensors mean. A header is believed only as far as the file is
long, so no number in it can make the reader allocate more than the file holds.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from kvq.errors import CacheFileError
from kvq.files.atomic import UnfinishedFile

MAX_HEADER_BYTES = 1 << 25
"""Longest header that is parsed; some kilobytes a layer are needed."""
CHECKSUM_KEY = "checksum"
NO_CHECKSUM = "0" * 64
"""Stands in the header while the checksum is computed over it."""
_PIECE_BYTES = 1 << 20
_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class SavedTensor:
    """A tensor to be written: its spec, and how to get it when its turn comes."""

    spec: TensorSpec
    fetch: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> SavedTensor:
        """Save a tensor that exists already."""
        return cls(TensorSpec(tuple(tensor.shape), tensor.dtype), lambda: tensor)


def is_storable(dtype: torch.dtype) -> bool:
    """Return whether the container has a name for a dtype."""
    return dtype in _NAMES


def write_container(file: UnfinishedFile, metadata: Mapping[str, str], tensors: Mapping[str, SavedTensor]) -> None:
    """Write tensors, one of them in memory at a time, and the metadata, to which the checksum is added.

    Args:
        file: empty.
        metadata: strings by name.
        tensors: by name; each is fetched once.
    """
    # Wide elements first: each tensor then begins at a multiple of its element size.
    names = sorted(tensors, key=lambda name: -tensors[name].spec.dtype.itemsize)
    table: dict[str, Any] = {"__metadata__": {CHECKSUM_KEY: NO_CHECKSUM, **metadata}}
    end = 0
    for name in names:
        spec, start = tensors[name].spec, end
        end += spec.nbytes
        table[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    header = text + b" " * (-len(text) % 8)
    checksum = hashlib.sha256()
    for piece in (len(header).to_bytes(8, "little"), header):
        checksum.update(piece)
        file.write(piece)
    for name in names:
        data = _bytes_of(tensors[name].fetch().detach().to("cpu").contiguous())
        checksum.update(data)
        file.write(data)
    file.write_at(8 + header.index(NO_CHECKSUM.encode()), checksum.hexdigest().encode())


class ContainerReader:
    """The tensors of a file, checked before any of them is read.

    Args:
        file: open for reading, at its beginning; owned by the caller.

    Raises:
        CacheFileError: the file is not such a container.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        size = file.seek(0, 2)
        file.seek(0)
        self._header = self._read_header(size)
        self._data_start = 8 + len(self._header)
        table = self._parse(self._header)
        self.metadata = self._check_metadata(table.pop("__metadata__", None))
        self._table = table
        self._size = size
        self.tensors: dict[str, TensorSpec] = {}
        self._starts: dict[str, int] = {}

    def check_checksum(self) -> None:
        """Compare the checksum with all bytes of the file.

        Raises:
            CacheFileError: it differs.
        """
        claimed = self.metadata.get(CHECKSUM_KEY, "").encode()
        if len(claimed) != len(NO_CHECKSUM) or self._header.count(claimed) != 1:
            raise CacheFileError("its checksum is missing or no checksum")
        checksum = hashlib.sha256(len(self._header).to_bytes(8, "little"))
        checksum.update(self._header.replace(claimed, NO_CHECKSUM.encode()))
        self._file.seek(self._data_start)
        while piece := self._file.read(_PIECE_BYTES):
            checksum.update(piece)
        if checksum.hexdigest().encode() != claimed:
            raise CacheFileError("its checksum differs from its content; it was damaged or changed")

    def check_table(self) -> None:
        """Read the table of tensors and compare it with the length of the file.

        Raises:
            CacheFileError: an entry is not a tensor, or the tensors do not fill the file exactly.
        """
        for name, entry in self._table.items():
            self.tensors[name], self._starts[name] = self._check_entry(name, entry)
        end = 0
        for name in sorted(self.tensors, key=lambda name: (self._starts[name], self.tensors[name].nbytes)):
            if self._starts[name] != end:
                raise CacheFileError(
                    f"tensor {name!r} begins at byte {self._starts[name]:,} of its data, not at {end:,}"
                )
            end += self.tensors[name].nbytes
        if self._data_start + end != self._size:
            raise CacheFileError(f"its tensors take {end:,} bytes, but {self._size - self._data_start:,} are there")

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor on the CPU; only after `check_table`."""
        spec = self.tensors[name]
        # A tensor made under inference_mode could not be written to outside of it.
        with torch.inference_mode(False):
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device="cpu")
        if spec.nbytes:
            self._file.seek(self._data_start + self._starts[name])
            self._read_into(_bytes_of(tensor))
        return tensor

    def _read_header(self, size: int) -> bytes:
        if size < 8:
            raise CacheFileError(f"it has {size} bytes, fewer than any safetensors file; it was cut off")
        length = int.from_bytes(self._read_exactly(8), "little")
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise CacheFileError(f"a header of {length:,} bytes is announced; it is not a safetensors file of a cache")
        if length > size - 8:
            raise CacheFileError(f"a header of {length:,} bytes is announced, {size - 8:,} are there; it was cut off")
        return self._read_exactly(length)

    @staticmethod
    def _parse(header: bytes) -> dict[str, Any]:
        try:
            text = header.decode()
        except UnicodeDecodeError as error:
            raise CacheFileError("its header is not text; it is not a safetensors file") from error
        table = parse_json(text, "its header")
        if not isinstance(table, dict):
            raise CacheFileError("its header is not a table of tensors; it is not a safetensors file")
        return table

    @staticmethod
    def _check_metadata(metadata: object) -> dict[str, str]:
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CacheFileError("it has no metadata; it is a safetensors file of something else")
        return metadata

    @staticmethod
    def _check_entry(name: str, entry: object) -> tuple[TensorSpec, int]:
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise CacheFileError(f"entry {name!r} of its header is not a tensor")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not (isinstance(entry["dtype"], str) and entry["dtype"] in _DTYPES and _are_sizes(shape)):
            raise CacheFileError(f"tensor {name!r} has dtype {entry['dtype']!r} and shape {shape!r}, which are unknown")
        spec = TensorSpec(tuple(shape), _DTYPES[entry["dtype"]])
        if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != spec.nbytes:
            raise CacheFileError(f"tensor {name!r} lies at {offsets!r}, but takes {spec.nbytes:,} bytes")
        return spec, offsets[0]

    def _read_exactly(self, count: int) -> bytes:
        data = bytearray(count)
        self._read_into(memoryview(data))
        return bytes(data)

    def _read_into(self, target: memoryview) -> None:
        done = 0
        while done < len(target):
            count = self._file.readinto(target[done:])  # type: ignore[attr-defined]  # of every binary file
            if not count:
                raise CacheFileError("it ended while it was read; something else is writing to it")
            done += count


def parse_json(text: str, what: str) -> Any:
    """Return the value that `text` is in JSON.

    Raises:
        CacheFileError: it is not JSON, or a name is given twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CacheFileError(f"{what} is not JSON: {error}") from error


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, without copying."""
    data: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return data


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 48 for size in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice")
    return found


def _refuse_constant(name: str) -> Iterator[Any]:
    raise ValueError(f"{name} is not a number")
