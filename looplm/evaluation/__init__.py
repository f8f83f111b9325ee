"""Measurements of a looped model: at every depth, and as it decodes."""
