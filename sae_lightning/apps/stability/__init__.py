"""Which latents recur in other dictionaries."""
