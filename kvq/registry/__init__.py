"""How backends are found by name: entry points, requirements, checks of a plugin's declaration."""

from kvq.registry.registry import BackendInfo, BackendRegistry, available_backends, get_registry, register_backend

__all__ = ["BackendInfo", "BackendRegistry", "available_backends", "get_registry", "register_backend"]
