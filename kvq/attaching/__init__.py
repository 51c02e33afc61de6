"""`attach`: every `generate` of a model gets a quantized cache, and is watched for whether it reads it."""
