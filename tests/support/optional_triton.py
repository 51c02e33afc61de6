"""The mark of tests that compile or interpret the programs for a GPU."""

import pytest

from kvq.attention.kernels.triton.kernel import LEAST_TRITON, TRITON

needs_triton = pytest.mark.skipif(TRITON.why_unavailable() is not None, reason=f"needs triton {LEAST_TRITON} or newer")
