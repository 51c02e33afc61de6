"""Which kernel runs: what is asked of one, which there are, what each layer remembers of the choice."""
