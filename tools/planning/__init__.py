"""What a layout of a recipe on a cluster would hold, compute, send and cost: formulas, and a search over layouts."""
