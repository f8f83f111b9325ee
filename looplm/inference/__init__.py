"""Generation with a cache: tokens at different loops in one pass, early exit per token, drafts, sampling.

Read in this order:

attention.py    the model's attention, split where the cache is: tokens to entries, entries to contexts
stack.py        the blocks, run once over whatever tokens share a pass
kv_cache.py     the cache: one per loop, or one that the loops share
early_exit.py   exit rules and scores, per token
settings.py     how to continue a text
text_stream.py  ids to text as they come
request.py      one text: what is asked for, its state, its result
sampling.py     logits to ids
prefill.py      prompts, in pieces
batch.py        texts in rows, and a pass of the stack over their tokens
depth_batch.py  continuous depth batching: tokens at different loops in one pass
speculation.py  the first loops draft, all loops check
scheduler.py    requests from a queue into the rows of a batch
generator.py    requests in, generations out
"""

from looplm.inference.generator import Generator
from looplm.inference.request import Generation, Request
from looplm.inference.settings import GenerationConfig

__all__ = ["Generation", "GenerationConfig", "Generator", "Request"]
