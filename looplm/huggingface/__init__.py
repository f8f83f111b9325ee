"""The doors to Hugging Face: one map of names used both ways, and the code that travels inside an export."""
