"""From raw text to Megatron token files: read, filter, deduplicate, split, tokenise, merge, describe; on datatrove."""
