"""Cluster operations: submission of a recipe's stages, and checks before a long run."""
