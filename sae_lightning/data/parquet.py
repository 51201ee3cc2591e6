"""Images in parquet files of the Hugging Face schema (image struct of bytes and path, label): demo and CIFAR-10."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae_lightning.data.errors import DataError, brief
from sae_lightning.data.images import ImageData
from sae_lightning.data.splits import cut

DEMO = Path(__file__).resolve().parents[1] / "assets" / "demo"
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10_GROUPS = {
    "animals": ["bird", "cat", "deer", "dog", "frog", "horse"],
    "vehicles": ["airplane", "automobile", "ship", "truck"],
}


def read_table(path: Path, columns: list[str]) -> pa.Table:
    """The named columns of a parquet file; DataError when the file or a column is missing."""
    if not path.is_file():
        raise DataError(f"There is no file {path}; set data.path to the folder that holds {path.name}.")
    try:
        present = pq.read_schema(path).names
        missing = [c for c in columns if c not in present]
        if missing:
            raise DataError(f"{path} has no column {missing}; it has {present}.")
        return pq.read_table(path, columns=columns)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} cannot be read ({brief(error)}); it is truncated or not parquet.") from error


class EncodedImages:
    """``read(i)`` gives the encoded bytes of image i, ``digest(i)`` their SHA-256."""

    def __init__(self, images: pa.Array) -> None:
        self.images = images

    def read(self, row: int) -> bytes:
        return self.images[row].as_py()

    def digest(self, row: int) -> bytes:
        return hashlib.sha256(self.read(row)).digest()


def from_table(table: pa.Table, ids: list[str], **kwargs: Any) -> ImageData:
    """ImageData over the rows of ``table``, its images kept as encoded bytes."""
    images = EncodedImages(table["image"].combine_chunks().field("bytes"))
    return ImageData(labels=table["label"].to_numpy(), image_ids=ids, read=images.read, content=images.digest, **kwargs)


def load_demo(cfg: dict[str, Any], split: str) -> ImageData:
    """The bundled part of CIFAR-10: ``experiments/demo_data`` made it, ``demo.json`` says from what."""
    about = json.loads((DEMO / "demo.json").read_text(encoding="utf-8"))
    table = read_table(DEMO / "demo.parquet", ["image", "label", "split", "image_id", "caption"])
    table = table.filter(pa.compute.equal(table["split"], split))
    return from_table(
        table,
        table["image_id"].to_pylist(),
        name="demo",
        split=split,
        class_names=about["class_names"],
        captions=table["caption"].to_pylist(),
        sibling_groups=about["sibling_groups"],
    )


def load_cifar10(cfg: dict[str, Any], split: str) -> ImageData:
    """CIFAR-10 from ``train.parquet`` and ``test.parquet`` in ``path``; val is a stratified share of train."""
    file = "test" if split == "test" else "train"
    table = read_table(Path(cfg["path"]) / f"{file}.parquet", ["image", "label"])
    index = np.arange(len(table))
    if split != "test":
        index = cut(table["label"].to_numpy(), {"val": cfg["val_share"]}, split, cfg["seed"])
        table = table.take(index)
    return from_table(
        table,
        [f"{file}-{i:05d}" for i in index],
        name="cifar10",
        split=split,
        class_names=CIFAR10_CLASSES,
        sibling_groups=CIFAR10_GROUPS,
    )
