"""Everything that the author of a backend imports, and nothing else.

A backend is a module with one hook, named by an entry point in the group `kvq.backends`:

    from kvq.plugin_api import API_VERSION, BackendSpec, Capabilities, hookimpl

    @hookimpl
    def kvq_backend() -> BackendSpec:
        return BackendSpec(name="mine", api_version=API_VERSION, capabilities=Capabilities(nbits=(4,)), build=build)

Keep that module light: it is imported when the backend is named, the vendor's library only inside `build`.
"""

from __future__ import annotations

from kvq.errors import KVQError, QuantizerContractError
from kvq.plugin_api.backend_spec import API_VERSION, BackendOptions, BackendSpec, Capabilities
from kvq.plugin_api.dtype_range import clamp_to_dtype
from kvq.plugin_api.granularity import AxisNames, Granularity
from kvq.plugin_api.hadamard import hadamard_transform
from kvq.plugin_api.hooks import hookimpl, hookspec
from kvq.plugin_api.packed_format import PackedFormat
from kvq.plugin_api.packing import pack_codes, packed_length, unpack_codes
from kvq.plugin_api.quantizer import AffineQuantizer, FusedScores, Part, Quantizer, QuantSpec, Side
from kvq.plugin_api.statistics import LayerStatistics

__all__ = [
    "API_VERSION",
    "AffineQuantizer",
    "AxisNames",
    "BackendOptions",
    "BackendSpec",
    "Capabilities",
    "FusedScores",
    "Granularity",
    "KVQError",
    "LayerStatistics",
    "PackedFormat",
    "Part",
    "QuantSpec",
    "Quantizer",
    "QuantizerContractError",
    "Side",
    "clamp_to_dtype",
    "hadamard_transform",
    "hookimpl",
    "hookspec",
    "pack_codes",
    "packed_length",
    "unpack_codes",
]
