"""A local web page to browse the latents of finished runs; ``apps/explorer.py`` starts it."""
