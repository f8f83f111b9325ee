"""A trained model made into another: deeper, looped, with another gate or with latent attention. Functions of tensors."""
