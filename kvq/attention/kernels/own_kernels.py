"""Our own kernels, the preferred ones first."""

from __future__ import annotations

from kvq.attention.dispatch.kernel_registry import register_kernel
from kvq.attention.kernels.blockwise import BlockwiseKernel
from kvq.attention.kernels.compiled.kernel import CompiledKernel
from kvq.attention.kernels.eager.kernel import REFERENCE
from kvq.attention.kernels.triton.kernel import TRITON

register_kernel(CompiledKernel())
register_kernel(TRITON)
register_kernel(BlockwiseKernel())
register_kernel(REFERENCE)
