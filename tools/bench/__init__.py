"""Speed and memory of this engine against plain torch."""
