"""Experiments: what was asked before they ran, the records of their runs, statistics, and a page with the verdict."""
