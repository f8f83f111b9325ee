"""Evaluation of a looped model: loss at every depth, along the exit gate's thresholds, and through each cache."""
