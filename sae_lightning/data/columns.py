"""Which columns of a Hugging Face data set hold the picture, its label and its caption."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from PIL import Image

from sae_lightning.data.decode import Source
from sae_lightning.data.errors import DataError, tell
from sae_lightning.data.images import Texts

IMAGE_NAMES = ("image", "images", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")

LABEL_NAMES = ("label", "labels", "class", "class_label", "class_name", "cls", "category", "target")

NO_LABEL = "none"  # data.label_column for a data set that is to be read without labels

CAPTION_NAMES = ("caption", "captions", "text", "txt", "description", "prompt", "alt_text")


@dataclass(frozen=True)
class Columns:
    """Names of columns; ``label`` and ``caption`` are None where the data set has none.

    ``passed_over`` names the other columns, each with its type, where a label was looked for and none was found.
    """

    image: str
    label: str | None
    caption: str | None
    passed_over: tuple[str, ...] | None = field(default=None, compare=False, repr=False)

    @property
    def all(self) -> list[str]:
        """Those that there are, each once."""
        return list(dict.fromkeys(c for c in (self.image, self.label, self.caption) if c is not None))


def find_columns(features: Mapping[str, Any], cfg: Mapping[str, Any], where: str) -> Columns:
    """The columns that ``cfg`` names with image_column, label_column and caption_column, or for null those that
    name and type tell: an image feature, a label with a usual name or else class labels, texts with a usual name.

    ``features`` is the data set's. ``label_column=none`` reads no label. DataError when a named column is missing,
    when there is no picture, when there are several that could be meant, and when a label's type is none of whole
    numbers and texts.
    """
    import datasets

    kinds = dict(features)
    unlabelled = cfg.get("label_column") not in (None, *kinds) and str(cfg["label_column"]).lower() == NO_LABEL
    for key in ("image_column", "label_column", "caption_column"):
        if cfg.get(key) is not None and cfg[key] not in kinds and not (key == "label_column" and unlabelled):
            raise DataError(f"'{where}' has no column '{cfg[key]}'; it has {list(kinds)}. Change data.{key}.")
    pictures = [c for c, kind in kinds.items() if isinstance(kind, datasets.Image)]
    encoded = [c for c, kind in kinds.items() if _usual(c, IMAGE_NAMES) and _is_encoded(kind)]
    texts = [c for c, kind in kinds.items() if c in CAPTION_NAMES and (_is_text(kind) or _is_text_list(kind))]
    image = cfg.get("image_column") or _only(pictures or encoded, IMAGE_NAMES, "image_column", where)
    if image is None:
        raise DataError(f"'{where}' has no column of pictures; it has {list(kinds)}. Name one with data.image_column.")
    caption = cfg.get("caption_column") or _only(texts, CAPTION_NAMES, "caption_column", where)
    if unlabelled:
        return Columns(image, None, caption)
    label = cfg.get("label_column") or _label(kinds, where)
    if label is not None and not _is_label(kinds[label]):
        raise DataError(_no_label(label, kinds[label], where))
    others = tuple(f"{c} ({_type(kind)})" for c, kind in kinds.items() if c not in (image, caption))
    return Columns(image, label, caption, others if label is None else None)


def _label(kinds: Mapping[str, Any], where: str) -> str | None:
    """The column of labels: a usual name comes before a type; a usual name of another type is said or refused."""
    import datasets

    named = [c for c in kinds if _usual(c, LABEL_NAMES) and not isinstance(kinds[c], datasets.Image)]
    usable = [c for c in named if _is_label(kinds[c])]
    classes = [c for c, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    found = _only(usable or classes, LABEL_NAMES, "label_column", where)
    other = next((c for c in named if c not in usable), None)
    if other is not None and found is None:
        raise DataError(_no_label(other, kinds[other], where))
    if other is not None:
        tell(f"Labels of '{where}' are those of its column '{found}'. {_no_label(other, kinds[other], where)}")
    return found


def _no_label(column: str, kind: Any, where: str) -> str:
    return (
        f"Column '{column}' of '{where}' holds {_type(kind)}; labels must be whole numbers or texts. Name another "
        "column with data.label_column, or say data.label_column=none."
    )


def _usual(column: str, names: Iterable[str]) -> bool:
    """Whether ``column`` is one of ``names``, in capitals or behind a prefix such as ``json.``, too."""
    return column.lower().rpartition(".")[2] in names


def _only(candidates: list[str], usual: Iterable[str], key: str, where: str) -> str | None:
    """The one candidate, or the one with a usual name; None without candidates, DataError when several are left."""
    exact = [c for c in candidates if c in usual]
    named = exact or [c for c in candidates if _usual(c, usual)]
    left = candidates if len(candidates) == 1 else named if len(named) == 1 else candidates
    if len(left) > 1:
        raise DataError(f"'{where}' has several columns that may be meant: {left}. Choose one with data.{key}.")
    return left[0] if left else None


def _dtype(kind: Any) -> str:
    return str(getattr(kind, "dtype", ""))


def _type(kind: Any) -> str:
    """The type of a column in words that fit into a sentence."""
    import datasets

    text = _dtype(kind) if isinstance(kind, datasets.Value) else " ".join(str(kind).split())
    return text if len(text) <= 80 else f"{text[:79]}…"


def _is_text(kind: Any) -> bool:
    return _dtype(kind) in ("string", "large_string", "string_view")


def _is_text_list(kind: Any) -> bool:
    return _is_text(getattr(kind, "feature", None))


def _is_label(kind: Any) -> bool:
    """Whole numbers and texts; also floats, which hold whole numbers in a table with a gap."""
    import datasets

    if not isinstance(kind, datasets.Value):
        return isinstance(kind, datasets.ClassLabel)
    return _is_text(kind) or _dtype(kind).startswith(("int", "uint", "bool", "float"))


def _is_encoded(kind: Any) -> bool:
    """Bytes, or a struct that holds bytes: pictures in parquet files that nobody declared to be pictures."""
    held = kind.get("bytes") if isinstance(kind, dict) else kind
    return _dtype(held) in ("binary", "large_binary", "binary_view")


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


def pictures(data: Any, column: str) -> Callable[[int], Source]:
    """Picture i of a Dataset, undecoded."""
    import datasets

    data = data.select_columns([column]).with_format(None)
    if isinstance(data.features[column], datasets.Image):
        data = data.cast_column(column, datasets.Image(decode=False))
    return partial(_cell, data, column, encoded)


def captions(data: Any, column: str) -> Texts:
    """The captions of a Dataset."""
    return Texts(partial(_cell, data.select_columns([column]).with_format(None), column, first_caption), len(data))


def _cell(data: Any, column: str, made: Callable[[Any], Any], row: int) -> Any:
    return made(data[row][column])


def row_id(split: str, row: int) -> str:
    """The id of an image with random access: its split's own name and its row."""
    return f"{split}-{row:08d}"
