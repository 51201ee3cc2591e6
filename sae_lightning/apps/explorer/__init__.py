"""A local web page to browse the latents of finished runs."""
