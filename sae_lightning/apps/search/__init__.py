"""Which images are alike, why, and what changes when a latent is turned."""
