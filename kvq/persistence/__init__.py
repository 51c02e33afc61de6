"""Files of caches: safetensors with a header that describes their content, written whole or not at all.

Owns the format, its checks and the fingerprints of model and backends. It knows layers, and no cache.
"""

from __future__ import annotations

from kvq.persistence.matching import check_calibration_matches
from kvq.persistence.model_reference import ModelReference
from kvq.persistence.reading import CacheFile
from kvq.persistence.writing import write_layers

__all__ = ["CacheFile", "ModelReference", "check_calibration_matches", "write_layers"]
