"""Which kernels there are, and how one is chosen for a request.

Another kernel of ours is a folder in `kvq/attention/kernels/` and a line in `own_kernels.py` there; anybody else's is
added by `register_kernel`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch

from kvq.attention.dispatch.kernel import BenchmarkedKernel, Kernel
from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.dispatch.standing import Standing, Standings
from kvq.attention.kernels.own_kernels import OWN_KERNELS
from kvq.attention.machine.variables import KERNEL_VARIABLE, read_variable
from kvq.errors import ConfigError, Fault


@dataclass(frozen=True)
class Choice:
    """The kernel for one kind of request, and why it is that one.

    Attributes:
        kernel: the chosen one.
        passed_over: for each kernel that would have come before it, the reason against it.
    """

    kernel: Kernel
    passed_over: dict[str, str] = field(default_factory=dict)


class KernelRegistry:
    """Some kernels, the preferred ones first, and what is known of them since the registry was made.

    Args:
        kernels: the preferred ones first. One of them has to take every request.
    """

    def __init__(self, kernels: Iterable[Kernel] = ()) -> None:
        self._kernels: dict[str, Kernel] = {}
        self._distrusted: dict[tuple[str, torch.device], str] = {}
        self._verified: set[tuple[str, Hashable]] = set()
        self._standings = Standings()
        for kernel in kernels:
            self.register(kernel)

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """All kernels, the preferred ones first."""
        return tuple(self._kernels.values())

    def register(self, kernel: Kernel) -> None:
        """Add a kernel behind the others, or in the place of the one that has its name."""
        self._kernels[kernel.name] = kernel

    def distrust(self, kernel: Kernel, device: torch.device, reason: str) -> None:
        """Disable a kernel on a device for the life of the registry."""
        self._distrusted[kernel.name, device] = reason

    def is_distrusted(self, kernel: Kernel, device: torch.device) -> bool:
        """Return whether a kernel was disabled on a device."""
        return bool(self._distrusted) and (kernel.name, device) in self._distrusted

    def is_verified(self, kernel: Kernel, kind: Hashable) -> bool:
        """Return whether a kernel has answered a request of this kind as the reference does."""
        return (kernel.name, kind) in self._verified

    def note_verified(self, kernel: Kernel, kind: Hashable) -> None:
        """Note that a kernel has answered a request of this kind as the reference does."""
        self._verified.add((kernel.name, kind))

    def choose(self, request: AttentionRequest, *, wanted: str | None = None) -> Choice:
        """Return the preferred kernel that can serve the request.

        Args:
            request: the call to serve.
            wanted: name of the kernel to use if it can serve the request, benchmarked or not, or "auto"; by default
                what `KVQ_ATTENTION_KERNEL` says.

        Raises:
            ConfigError: there is no kernel of the wanted name.
        """
        wanted = self.find_wanted() if wanted is None else self._known_name(wanted, "wanted")
        passed_over: dict[str, str] = {}
        for kernel in sorted(self.kernels, key=lambda kernel: kernel.name != wanted):
            reason = self._why_passed_over(kernel, request, is_wanted=kernel.name == wanted)
            if reason is None:
                return Choice(kernel, passed_over)
            passed_over[kernel.name] = reason
        # The reference is one of our own kernels and takes everything.
        raise ConfigError([Fault((KERNEL_VARIABLE,), f"no kernel serves this request: {passed_over}")])

    def why_not_default(
        self, kernel: Kernel, device: torch.device, *, is_wanted: bool = False, may_try: bool = False
    ) -> str | None:
        """Return why a kernel is not a default on a device, for any request, or None where it is.

        Args:
            kernel: the kernel.
            device: where the query lives.
            is_wanted: whether the user asked for it by name, which needs no benchmark.
            may_try: whether a kernel of which nothing is known may be tried now.
        """
        exclusion = self._why_excluded(kernel, device)
        if exclusion is not None or is_wanted:
            return exclusion
        standing = self.examine(kernel, device, may_try=may_try)
        return None if standing is None else standing.reason

    def examine(
        self, kernel: Kernel, device: torch.device, *, may_try: bool = False, must_try: bool = False
    ) -> Standing | None:
        """Return what is known of a kernel that needs a benchmark; None for one that needs none.

        Args:
            kernel: the kernel, which runs on this type of device.
            device: where the query would live.
            may_try: whether a kernel of which nothing is known may be tried now.
            must_try: whether it is tried in any case.
        """
        if not kernel.needs_benchmark:
            return None
        others, benchmarked = self._list_others(kernel, device), cast(BenchmarkedKernel, kernel)
        if must_try and kernel.why_unavailable() is None:
            return self._standings.try_again(benchmarked, device, others)
        return self._standings.find(benchmarked, device, others, may_try=may_try)

    def find_wanted(self) -> str | None:
        """Return the kernel that `KVQ_ATTENTION_KERNEL` names, or None.

        Raises:
            ConfigError: there is none of that name.
        """
        name = read_variable(KERNEL_VARIABLE)
        return None if name is None else self._known_name(name, KERNEL_VARIABLE, source="the environment")

    def _known_name(self, name: str, given_as: str, source: str | None = None) -> str | None:
        """Return the name of a kernel, or None for "auto"; an error says as which option it was given."""
        if name == "auto":
            return None
        if name not in self._kernels:
            problem = f"{name!r} is not a kernel; choose one of 'auto', {', '.join(map(repr, self._kernels))}"
            raise ConfigError([Fault((given_as,), problem)], source=source)
        return name

    def _why_passed_over(self, kernel: Kernel, request: AttentionRequest, *, is_wanted: bool) -> str | None:
        device = request.query.device
        # A kernel that cannot serve the request is not tried for it.
        return (
            self._why_excluded(kernel, device)
            or kernel.why_unsupported(request)
            or self.why_not_default(kernel, device, is_wanted=is_wanted, may_try=True)
            or kernel.why_unavailable()
        )

    def _why_excluded(self, kernel: Kernel, device: torch.device) -> str | None:
        if kernel.device_types and device.type not in kernel.device_types:
            return f"runs on {', '.join(sorted(kernel.device_types))} only"
        return self._distrusted.get((kernel.name, device))

    def _list_others(self, kernel: Kernel, device: torch.device) -> Sequence[Kernel]:
        """Return the kernels that may run instead of one without a benchmark, preferred first."""
        known = [one for one in self.kernels if not one.needs_benchmark and one.name != kernel.name]
        return [one for one in known if self._why_excluded(one, device) is None]


_registry = KernelRegistry(OWN_KERNELS)


def get_kernel_registry() -> KernelRegistry:
    """Return the registry that attention chooses from."""
    return _registry


def register_kernel(kernel: Kernel) -> None:
    """Add a kernel from code; see `KernelRegistry.register`."""
    _registry.register(kernel)


@contextmanager
def use_kernel_registry(registry: KernelRegistry) -> Iterator[None]:
    """Let attention choose from another registry within the block, in all threads.

    Layers that have chosen before stay with their choice; see `KernelCache`. Blocks of two threads must not overlap.
    """
    global _registry
    before, _registry = _registry, registry
    try:
        yield
    finally:
        _registry = before
