"""Requests to the compiled kernel as files, for programs that run on other processors; see `replay.c`."""

from __future__ import annotations

import ctypes
import struct

import torch

from kvq.attention.kernels.compiled import kernel as kernel_module
from kvq.attention.kernels.compiled.kernel import CompiledKernel
from kvq.attention.kernels.compiled.structures import PackedRequest, PackedSegment
from kvq.store.balance import FACTORS

GAP = 64
"""Bytes between what lies apart in memory, and to which each is aligned."""


class Recorder:
    """Stands for the library: writes down what it is asked."""

    run_parallel = None

    def __init__(self, request):
        self.request = request
        self.image = b""

    def attend(self, address):
        self.image = Image(PackedRequest.from_address(address), self.request).to_bytes()
        return 0


def write_request(request, monkeypatch):
    """Return the bytes of a file with a request in it."""
    recorder = Recorder(request)
    with monkeypatch.context() as patched:
        patched.setattr(kernel_module, "get_library", lambda: recorder)
        CompiledKernel().attend(request)
    return recorder.image


def read_output(data, request):
    """Return the output `[B, Tq, Hq, D_v]` that a program wrote."""
    batch, heads, queries, _ = request.query.shape
    shape = (batch, queries, heads, request.pair.value.like.shape[3])
    return torch.frombuffer(bytearray(data), dtype=request.query.dtype).reshape(shape)


class Image:
    """Everything that a request points to, in one piece, with the places of its pointers."""

    def __init__(self, packed, request):
        self.memory = bytearray()
        self.regions = []
        self.pointers = []
        self._add(ctypes.addressof(packed), ctypes.sizeof(packed))
        batch, heads, queries, _ = request.query.shape
        elements = batch * heads * queries * request.pair.value.like.shape[3]
        self.output_size = elements * request.query.element_size()
        self.output = self._add(packed.output, self.output_size)
        self._add(packed.sink_starts, 8 * batch)
        for tensor in list_tensors(request):
            storage = tensor.untyped_storage()
            self._add(storage.data_ptr(), storage.nbytes())
        arrays = []
        for side in (packed.key, packed.value):
            address = ctypes.cast(side.segments, ctypes.c_void_p).value
            size = ctypes.sizeof(PackedSegment) * side.segment_count
            arrays.append((address, self._add(address, size), side.segment_count))
        self._point(packed, 0)
        for address, place, count in arrays:
            for segment, offset in zip((PackedSegment * count).from_address(address), range(count), strict=True):
                self._point(segment, place + offset * ctypes.sizeof(PackedSegment))

    def to_bytes(self):
        places = [number for pointer in self.pointers for number in pointer]
        sizes = (len(self.memory), self.output, self.output_size, len(self.pointers), ctypes.sizeof(PackedRequest))
        return struct.pack(f"={5 + len(places)}q", *sizes, *places) + bytes(self.memory)

    def _add(self, address, size):
        """Copy a piece of memory; return where it stands."""
        self.memory += bytes(GAP + -len(self.memory) % GAP) if self.memory else b""
        place = len(self.memory)
        self.memory += ctypes.string_at(address, size) if size else b""
        self.regions.append((address, size, place))
        return place

    def _point(self, structure, place):
        for name, kind, *_ in structure._fields_:
            offset = place + getattr(type(structure), name).offset
            value = getattr(structure, name)
            if isinstance(value, ctypes.Structure):
                self._point(value, offset)
            elif isinstance(value, ctypes.Array):
                size = ctypes.sizeof(value._type_)
                for number in range(len(value)):
                    if issubclass(value._type_, ctypes.Structure):
                        self._point(value[number], offset + number * size)
                    elif value._type_ is ctypes.c_void_p:
                        self._point_at(value[number], offset + number * size)
            elif kind is ctypes.c_void_p or hasattr(value, "contents"):
                self._point_at(ctypes.cast(value, ctypes.c_void_p).value if value else None, offset)

    def _point_at(self, address, place):
        if not address:
            return
        for start, size, target in self.regions:
            if start <= address < start + max(1, size):
                self.pointers.append((place, target + address - start))
                return
        raise AssertionError(f"a pointer at {place} leads to memory that is not known")


def list_tensors(request):
    pair = request.pair
    found = [request.query, request.mask, request.sink_logits]
    for side in (pair.key, pair.value):
        found += [side.sinks.states, side.window, side.new]
        for segment in side.store.segments:
            found += [segment.rows, *segment.parts.values()]
    constants = [constants for _, constants in pair.kernel_cache.kernel_data["compiled"].kept]
    found += [FACTORS.numbers, *(tensor for own in constants for tensor in own.values())]
    return [tensor for tensor in found if tensor is not None]
