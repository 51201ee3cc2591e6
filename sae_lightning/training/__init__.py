"""Training SAEs with Lightning."""
