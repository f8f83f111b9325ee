"""Commands around a model: counting, measuring, converting."""

import looplm as looplm  # first, so that its warning filter stands before Megatron-core is imported
