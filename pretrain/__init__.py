"""Training: data, optimizer, step, metrics, and the commands that use them."""

import looplm as looplm  # first, so that its warning filter stands before Megatron-core is imported
