"""How tokens are held: packed chunks of any quantizer, and the full-precision window."""
