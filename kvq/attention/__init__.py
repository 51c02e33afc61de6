"""How attention reads a quantized layer: the handle that `update` returns, and the "kvq" attention."""
