"""Everything specific to Megatron-core, to CPU versus CUDA, and to the process groups of a job."""
