"""Codes of whole images as SciPy and as the metrics hold them, and where each latent is strongest."""

from __future__ import annotations
