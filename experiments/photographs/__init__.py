"""SAEs on real photographs: what the tables and figures of docs/photographs.md are made by."""
