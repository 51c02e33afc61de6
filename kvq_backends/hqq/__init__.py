"""hqq as a backend: half-quadratic quantization, calibration-free."""
