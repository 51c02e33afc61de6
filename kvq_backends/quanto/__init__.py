"""optimum-quanto as a backend: round-to-nearest between the extremes of each group."""
