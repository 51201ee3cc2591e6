"""The one exception of this package."""

from __future__ import annotations


class FinetuneError(ValueError):
    """A model, layer, data set or similarity store with which fine-tuning cannot work; the message says what to do."""
