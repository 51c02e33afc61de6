"""Our own kernels, the preferred ones first."""

from __future__ import annotations

from kvq.attention.dispatch.kernel import Kernel
from kvq.attention.kernels.blockwise import BlockwiseKernel
from kvq.attention.kernels.compiled.kernel import CompiledKernel
from kvq.attention.kernels.eager.kernel import REFERENCE
from kvq.attention.kernels.triton.kernel import TRITON

OWN_KERNELS: tuple[Kernel, ...] = (
    CompiledKernel(),
    TRITON,
    BlockwiseKernel(),
    REFERENCE,
)
