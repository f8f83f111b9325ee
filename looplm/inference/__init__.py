"""Generation with a cache: tokens at different loops in one pass, early exit per token, drafts, sampling.

attention.py    one attention module with a cache between its two halves
stack.py        the blocks, once over whatever tokens share a pass
kv_cache.py     what is kept of the past: a cache per loop, or one that the loops share
early_exit.py   when a token leaves the loops
prefill.py      prompts, in pieces
depth_batch.py  tokens at different loops in one pass: continuous depth batching
speculation.py  the first loops draft, all loops check
decode.py       rows in lock step, for measuring
settings.py     how to continue a text
request.py      one text on its way
sampling.py     logits to ids
text_stream.py  ids to text as they come
scheduler.py    requests from a queue into the rows of a batch
generate.py     requests in, generations out
"""
