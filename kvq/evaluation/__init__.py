"""Measure how much quality a quantized cache costs, against full precision."""
