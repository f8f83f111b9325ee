"""Rehearsal: one rank of a cluster run executes a training step on a CPU, without computing or sending numbers."""
