"""Which kernel runs: requests and their kinds, the registry of kernels, the check at first use, cached choices."""
