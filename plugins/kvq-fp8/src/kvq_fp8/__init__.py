"""float8 for kvq: e4m3 or e5m2 with a scale per token or per channel."""
