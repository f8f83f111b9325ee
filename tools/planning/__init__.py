"""Predicted memory, FLOPs, traffic and cost of a recipe in a parallel layout, and a search over layouts."""
