"""KV-cache quantization for Hugging Face transformers, with pluggable quantizers.

from kvq import attach

with attach(model, nbits_k=4, nbits_v=2):
    model.generate(**inputs)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvq.attaching.attachment import Attachment, attach
    from kvq.cache import KVQ
    from kvq.cache.encoder_decoder import EncoderDecoderKVQ
    from kvq.calibrating import calibrate
    from kvq.calibration import Calibration
    from kvq.config import KVQCacheConfig, LayerConfig
    from kvq.errors import KVQError
    from kvq.layers.memory_report import MemoryReport
    from kvq.registry import available_backends, register_backend

__all__ = [
    "KVQ",
    "Attachment",
    "Calibration",
    "EncoderDecoderKVQ",
    "KVQCacheConfig",
    "KVQError",
    "LayerConfig",
    "MemoryReport",
    "attach",
    "available_backends",
    "calibrate",
    "register_backend",
]

__version__ = "1.0.0.dev0"

# Resolved at first use: transformers imports hqq where it is installed, which `import kvq` and `kvq --help` must not.
_HOMES = {
    "KVQ": "kvq.cache",
    "Attachment": "kvq.attaching.attachment",
    "Calibration": "kvq.calibration",
    "EncoderDecoderKVQ": "kvq.cache.encoder_decoder",
    "KVQCacheConfig": "kvq.config",
    "KVQError": "kvq.errors",
    "LayerConfig": "kvq.config",
    "MemoryReport": "kvq.layers.memory_report",
    "attach": "kvq.attaching.attachment",
    "available_backends": "kvq.registry",
    "calibrate": "kvq.calibrating",
    "register_backend": "kvq.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvq' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
