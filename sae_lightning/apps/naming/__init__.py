"""Which word each latent stands for."""
