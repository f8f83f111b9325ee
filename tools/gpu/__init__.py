"""First check of a machine with one NVIDIA GPU: each part measures one thing in a process of its own."""
