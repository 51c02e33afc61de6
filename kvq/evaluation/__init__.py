"""What quantizing the cache costs in answers, measured against full precision."""
