"""The model code that travels inside an export. These files import only torch, transformers and each other."""
