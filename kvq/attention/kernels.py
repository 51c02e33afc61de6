"""Our own kernels, the preferred ones first."""

from __future__ import annotations

from kvq.attention.blockwise import BlockwiseKernel
from kvq.attention.compiled.kernel import CompiledKernel
from kvq.attention.eager import REFERENCE
from kvq.attention.kernel import register_kernel
from kvq.attention.triton_decode import TRITON

register_kernel(CompiledKernel())
register_kernel(TRITON)
register_kernel(BlockwiseKernel())
register_kernel(REFERENCE)
