"""What `kvq doctor` says of the kernels of attention: which are defaults, what speaks for them and what against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvq.attention.dispatch.kernel import Kernel
    from kvq.attention.dispatch.standing import Standing


def list_kernels(devices: Sequence[str], *, prove: bool = False) -> list[dict[str, Any]]:
    """Return plain values for each kernel on each device.

    Args:
        devices: as torch names them.
        prove: try the kernels that need proof and can run, whatever is known of them, and keep what is found.

    Raises:
        ConfigError: an environment variable names no kernel, or says neither yes nor no.
    """
    from kvq.attention.dispatch.kernel_registry import available_kernels, wanted_kernel
    from kvq.attention.dispatch.standing import are_trials_on

    wanted_kernel(), are_trials_on()  # what is mistyped is told before anything is tried
    return [_describe(kernel, device, prove=prove) for device in devices for kernel in available_kernels()]


def _describe(kernel: Kernel, device_name: str, *, prove: bool) -> dict[str, Any]:
    import torch

    from kvq.attention.dispatch.kernel_registry import examine, find_reason_against, wanted_kernel

    device = torch.device(device_name)
    runs_here = not kernel.device_types or device.type in kernel.device_types
    standing = examine(kernel, device, must_try=prove) if runs_here else None
    reason = find_reason_against(kernel, device, is_wanted=kernel.name == wanted_kernel()) or kernel.find_problem()
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
