"""Training text that is made, not found: from a seed, without a network."""
