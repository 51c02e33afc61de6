"""Files of named tensors: written whole or not at all, every byte checked. What the tensors mean is known elsewhere."""
