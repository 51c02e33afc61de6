"""A real language model on every machine: fetched once, checked, and kept in the user's cache folder."""
