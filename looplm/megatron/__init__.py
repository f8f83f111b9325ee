"""What LoopLM knows of Megatron-core, of CPU versus CUDA, and of the process groups of a job."""
