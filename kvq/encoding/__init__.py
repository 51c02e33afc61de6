"""Quantizing in C: the steps around a quantizer, and rounding to nearest itself, in one pass over each block."""
