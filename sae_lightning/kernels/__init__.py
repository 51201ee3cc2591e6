"""Sparse products and selections behind the SAEs, chosen by device (``products.choose``)."""

from sae_lightning.kernels.products import dense_levels, level_errors, nested_decode, sparse_decode, sparse_pre_acts

__all__ = ["dense_levels", "level_errors", "nested_decode", "sparse_decode", "sparse_pre_acts"]
