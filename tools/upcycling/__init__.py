"""Turning a trained model into another: deeper, looped, with another gate or with latent attention."""
