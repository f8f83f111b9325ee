"""Training: data, trainer, metrics, evaluation, reports, and the commands for clusters."""

import looplm as looplm  # sets a warning filter before Megatron-core is imported
