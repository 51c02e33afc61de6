"""The tables of docs/configuration.md, from the descriptions of the fields: fields, backends and their options."""

from __future__ import annotations

from typing import Any

from markdown_table import table
from pydantic.fields import FieldInfo

from kvq import KVQCacheConfig, LayerConfig, available_backends
from kvq.registry import get_registry


def own_backends() -> list[Any]:
    """Return the backends of this distribution, not of others that are installed."""
    return [backend for backend in available_backends(load=True) if backend.origin == "kvq"]


def render_fields() -> str:
    """Return the fields of the configuration."""
    rows = [
        (f"`{name}`", f"`{render_default(field)}`", field.description or "")
        for name, field in KVQCacheConfig.model_fields.items()
    ]
    return table(("field", "default", "meaning"), rows)


def render_layer_fields() -> str:
    """Return the fields of an entry of `layers`."""
    rows = [(f"`{name}`", field.description or "") for name, field in LayerConfig.model_fields.items()]
    return table(("field of an entry", "meaning"), rows)


def render_default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return str(value) if isinstance(value, str) else repr(value)


def render_backends() -> str:
    """Return the backends of this distribution."""
    rows = [
        (
            f"`{backend.name}`",
            ", ".join(f"{bits:g}" for bits in backend.spec.capabilities.nbits),
            ", ".join(f"`{word}`" for word in backend.spec.capabilities.granularities),
            backend.spec.summary,
        )
        for backend in own_backends()
    ]
    return table(("name", "bits", "granularities", "summary"), rows)


def render_options() -> str:
    """Return the options of the backends of this distribution."""
    rows = [
        (f"`{backend.name}`", f"`{name}`", f"`{field.get_default()}`", field.description or "")
        for backend in own_backends()
        for name, field in get_registry().get_backend(backend.name).options.model_fields.items()
    ]
    return table(("backend", "option", "default", "meaning"), rows)
