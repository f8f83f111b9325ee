"""The model that travels inside an export: these files import torch, transformers and each other alone."""
