"""Mixed widths for kvq: keys of 2 bits, and of 4 in the channels that matter most (Kitty, arXiv 2511.18643)."""
