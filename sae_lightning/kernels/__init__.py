"""Sparse products behind the SAEs."""

from sae_lightning.kernels.decode import sparse_decode

__all__ = ["sparse_decode"]
