"""Speed and memory of decoding: kvq, transformers' caches and a preallocated buffer, side by side in one run."""
