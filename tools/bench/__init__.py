"""Speed and memory of LoopLM compared with plain torch."""
