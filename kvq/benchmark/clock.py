"""Time and peak memory of one call on a CPU or on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

CPU_TOOL = "torch.profiler memory events"
CUDA_TOOL = "torch.cuda.max_memory_allocated"

_COUNTED = "kvq: counted call"


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds that `call` takes, its work on the device included."""
    if device.type == "cuda":
        return _time_events(call, device)
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def transient_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return the rise of memory during `call` above its level afterwards.

    On a CPU it is called twice, and the second call counts: the allocations of torch, event by event. Memory that a
    library takes from the system by itself is not seen. On a GPU it is called once, and the peak of torch's allocator
    counts.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()  # the counted call may free this call's memory: the profiler must have seen its allocation
        with record_function(_COUNTED):
            call()
    results: Any = profiled.profiler.kineto_results
    events = sorted(results.events(), key=lambda event: event.start_ns())
    start = next(event.start_ns() for event in events if event.name() == _COUNTED)
    memory = [event for event in events if event.name() == "[memory]" and event.start_ns() >= start]
    return peak_above_end([event.nbytes() for event in memory])


def peak_above_end(changes: list[int]) -> int:
    """Return how far the running sum of changes in bytes rises above its end."""
    alive = peak = 0
    for change in changes:
        alive += change
        peak = max(peak, alive)
    return peak - alive


def memory_tool(device: torch.device) -> str:
    """Return the name of the tool that `transient_bytes` measures with."""
    return CUDA_TOOL if device.type == "cuda" else CPU_TOOL


def _time_events(call: Callable[[], object], device: torch.device) -> float:
    torch.cuda.synchronize(device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end))
