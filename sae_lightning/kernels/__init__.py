"""Sparse products and selections behind the SAEs, chosen by device (``products.choose``)."""

from sae_lightning.kernels.products import level_errors, nested_decode, sparse_decode, sparse_pre_acts

__all__ = ["level_errors", "nested_decode", "sparse_decode", "sparse_pre_acts"]
