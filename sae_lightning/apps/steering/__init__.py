"""What a vision-language model says when a latent is turned."""
