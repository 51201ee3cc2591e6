"""What the rows of a Hugging Face data set hold: a picture, undecoded, and its caption."""

from __future__ import annotations

from typing import Any

from PIL import Image

from sae_lightning.data.decode import Source


def encoded(value: Any) -> Source:
    """The cell of an image column as bytes, path, address or picture; no bytes when it is empty or something else."""
    held = value
    if isinstance(value, dict):
        held = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    return held if isinstance(held, bytes | str | Image.Image) else b""


def first_caption(value: Any) -> str:
    """The cell of a caption column: the first of several, an empty text for none."""
    if isinstance(value, list):
        value = value[0] if value else None
    return "" if value is None else str(value)


class Pictures:
    """Picture i of a Dataset, undecoded."""

    def __init__(self, data: Any, column: str) -> None:
        import datasets

        data = data.select_columns([column]).with_format(None)
        is_image = isinstance(data.features[column], datasets.Image)
        self.data = data.cast_column(column, datasets.Image(decode=False)) if is_image else data
        self.column = column

    def __call__(self, row: int) -> Source:
        return encoded(self.data[row][self.column])


class Captions:
    """Caption i of a Dataset."""

    def __init__(self, data: Any, column: str) -> None:
        self.data, self.column = data.select_columns([column]).with_format(None), column

    def __call__(self, row: int) -> str:
        return first_caption(self.data[row][self.column])


def row_id(split: str, row: int) -> str:
    """The id of an image with random access: its split's own name and its row."""
    return f"{split}-{row:08d}"
