"""Conversion to and from Hugging Face directories, and the model code that travels inside an export."""
