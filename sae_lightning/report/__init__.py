"""The HTML report: one self-contained page over finished runs."""
