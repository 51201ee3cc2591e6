"""What a classifier's decisions rest on, told by latents."""
