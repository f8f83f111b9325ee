"""Training text that is generated from a seed, without a network."""
