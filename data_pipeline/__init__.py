"""From raw text to Megatron token files, on datatrove: read, filter, deduplicate, split, tokenize, merge, describe."""
