"""The one exception of this package."""

from __future__ import annotations


class VLMError(ValueError):
    """A vision-language model that cannot be had, or a layer, picture or prompt that does not fit it."""
