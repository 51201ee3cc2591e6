"""What a grid of evaluated runs says: ViSAEBench's analyses as pure functions of one table, one row a run."""
