"""How attention reads a quantized layer: the handle that `update` returns, and the "kvq" attention."""

from __future__ import annotations

ATTENTION_NAME = "kvq"
"""The name under which transformers knows our attention."""
