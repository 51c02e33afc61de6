"""Decoding on a GPU, in Triton's language."""
