"""Measurements of a looped model at every depth."""
