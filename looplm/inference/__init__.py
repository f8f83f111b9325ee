"""Generation with a cache: batches of uneven prompts, sampling, early exit per token.

attention.py    one attention module with a cache between its two halves
kv_cache.py     what is kept of the past: a cache per loop, or one that the loops share
early_exit.py   when a token leaves the loops
decode.py       the model run through the cache: prompts, then one token at a time
sampling.py     logits to ids
text_stream.py  ids to text as they come
generate.py     requests in, generations out
"""
