"""Looped language models on Megatron-core: one stack of blocks, run several times with the same weights."""

import warnings

# What Megatron-core says at every start without Apex and Transformer Engine, and of its own use of deprecated names.
# None of it can be acted on here; the README says once what is missing without a GPU.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "Please use DTensor instead",
    "`load_state_dict` is deprecated",
):
    warnings.filterwarnings("ignore", message=_message)
