"""Small synthetic tasks on long contexts, after RULER (arXiv 2404.06654): what a cache must not forget."""
