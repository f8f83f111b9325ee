"""Training text and tasks that are generated from a seed, without a network."""
