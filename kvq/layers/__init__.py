"""One layer of a model: its quantized keys and values, how its quantizers are built, where it lies, what it takes."""
