"""Cluster operations: submitting the stages of a recipe, and checks before a long run."""
