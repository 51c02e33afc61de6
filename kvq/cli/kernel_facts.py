"""The kernels of attention for `kvq doctor`: which are defaults, and the reasons for and against each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvq.attention.dispatch.kernel import Kernel
    from kvq.attention.dispatch.kernel_registry import KernelRegistry
    from kvq.attention.dispatch.standing import Standing


def list_kernels(devices: Sequence[str], *, prove: bool = False) -> list[dict[str, Any]]:
    """Return plain values for each kernel on each device.

    Args:
        devices: names of devices, as torch has them.
        prove: try the kernels that need a benchmark and can run, even those with a verdict, and keep the new ones.

    Raises:
        ConfigError: an environment variable names no kernel, or is neither on nor off.
    """
    from kvq.attention.dispatch.kernel_registry import get_kernel_registry
    from kvq.attention.dispatch.standing import are_trials_on

    registry = get_kernel_registry()
    registry.find_wanted(), are_trials_on()  # a mistyped variable is refused before anything is tried
    return [_describe(registry, kernel, device, prove=prove) for device in devices for kernel in registry.kernels]


def _describe(registry: KernelRegistry, kernel: Kernel, device_name: str, *, prove: bool) -> dict[str, Any]:
    import torch

    device = torch.device(device_name)
    runs_here = not kernel.device_types or device.type in kernel.device_types
    standing = registry.examine(kernel, device, must_try=prove) if runs_here else None
    is_wanted = kernel.name == registry.find_wanted()
    reason = registry.why_not_default(kernel, device, is_wanted=is_wanted) or kernel.why_unavailable()
    return {
        "device": device_name,
        "name": kernel.name,
        "default": reason is None,
        "reason": reason,
        "fault": None if standing is None or standing.verdict is None else standing.verdict.fault,
        "proof": None if standing is None else _describe_proof(standing),
    }


def _describe_proof(standing: Standing) -> dict[str, Any]:
    from kvq.attention.proving.verdicts import facts_of

    if standing.origin == "measured here" and standing.verdict is not None:
        return {"origin": standing.origin, **facts_of(standing.verdict)}
    record = standing.record
    if standing.origin == "shipped record" and record is not None:
        known = {key: record[key] for key in ("relative_error", "speedup")}
        return {"origin": standing.origin, "passing": True, "over": "full precision", **known}
    return {"origin": standing.origin}
