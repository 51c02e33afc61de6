"""TurboQuant for kvq: random rotation, per-vector norm and optimal scalar codebooks (arXiv 2504.19874)."""
