"""Which columns of a Hugging Face data set hold the picture, its label and its caption."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sae_lightning.data.errors import DataError

IMAGE_NAMES = ("image", "images", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")
LABEL_NAMES = ("label", "labels", "class", "class_label", "class_name", "cls", "category", "target")
CAPTION_NAMES = ("caption", "captions", "text", "txt", "description", "prompt", "alt_text")


@dataclass(frozen=True)
class Columns:
    """Names of columns; ``label`` and ``caption`` are None where the data set has none."""

    image: str
    label: str | None
    caption: str | None

    @property
    def all(self) -> list[str]:
        """Those that there are, each once."""
        return list(dict.fromkeys(c for c in (self.image, self.label, self.caption) if c is not None))


def find_columns(features: Mapping[str, Any], cfg: Mapping[str, Any], where: str) -> Columns:
    """The columns that ``cfg`` names with image_column, label_column and caption_column, or for null those that
    type and name tell: an image feature, class labels or else a column with a usual name.

    ``features`` is the data set's. DataError when a named column is missing, when there is no picture, and
    when there are several that could be meant.
    """
    import datasets

    kinds = dict(features)
    for key in ("image_column", "label_column", "caption_column"):
        if cfg.get(key) is not None and cfg[key] not in kinds:
            raise DataError(f"'{where}' has no column '{cfg[key]}'; it has {list(kinds)}. Change data.{key}.")
    pictures = [c for c, kind in kinds.items() if isinstance(kind, datasets.Image)]
    encoded = [c for c, kind in kinds.items() if c in IMAGE_NAMES and _is_encoded(kind)]
    classes = [c for c, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    names = [c for c, kind in kinds.items() if c in LABEL_NAMES and _is_name(kind)]
    texts = [c for c, kind in kinds.items() if c in CAPTION_NAMES and (_is_text(kind) or _is_text_list(kind))]
    image = cfg.get("image_column") or _only(pictures or encoded, IMAGE_NAMES, "image_column", where)
    if image is None:
        raise DataError(f"'{where}' has no column of pictures; it has {list(kinds)}. Name one with data.image_column.")
    label = cfg.get("label_column") or _only(classes or names, LABEL_NAMES, "label_column", where)
    if label is not None and not (isinstance(kinds[label], datasets.ClassLabel) or _is_name(kinds[label])):
        raise DataError(f"Column '{label}' of '{where}' holds {kinds[label]}; labels must be whole numbers or texts.")
    return Columns(image, label, cfg.get("caption_column") or _only(texts, CAPTION_NAMES, "caption_column", where))


def _only(candidates: list[str], usual: Iterable[str], key: str, where: str) -> str | None:
    """The one candidate, or the one with a usual name; None without candidates, DataError when several are left."""
    named = [c for c in candidates if c in usual]
    left = candidates if len(candidates) == 1 else named if len(named) == 1 else candidates
    if len(left) > 1:
        raise DataError(f"'{where}' has several columns that may be meant: {left}. Choose one with data.{key}.")
    return left[0] if left else None


def _dtype(kind: Any) -> str:
    return str(getattr(kind, "dtype", ""))


def _is_text(kind: Any) -> bool:
    return _dtype(kind) in ("string", "large_string")


def _is_text_list(kind: Any) -> bool:
    return _is_text(getattr(kind, "feature", None))


def _is_name(kind: Any) -> bool:
    return _is_text(kind) or _dtype(kind).startswith(("int", "uint", "bool"))


def _is_encoded(kind: Any) -> bool:
    """Bytes, or a struct that holds bytes: pictures in parquet files that nobody declared to be pictures."""
    held = kind.get("bytes") if isinstance(kind, dict) else kind
    return _dtype(held) in ("binary", "large_binary")
