"""ViSAEBench: what its open choices change."""
