"""`attach`: every `generate` of a model gets a quantized cache, and a watch checks that the model reads it."""
