"""Any Hugging Face data set of images, by its id on the hub or a local path."""

from __future__ import annotations

from typing import Any

import numpy as np

from sae_lightning.data.images import DataError, ImageData, split_indices


def load_hub(cfg: dict[str, Any], split: str) -> ImageData:
    """Columns ``image_column`` and ``label_column`` of the data set ``id``; splits it lacks are cut from its train.

    ``splits`` maps train, val and test to the data set's own names, or to null where it has none.
    """
    import datasets

    names = dict(cfg["splits"])
    source = names.get(split) or names["train"]
    try:
        data = datasets.load_dataset(cfg["id"], cfg.get("config"), split=source)
    except Exception as error:
        raise DataError(
            f"The data set '{cfg['id']}' (split '{source}') cannot be loaded: {error}. "
            "Check data.id and data.splits, or the connection; a local path works offline."
        ) from error
    for column in (cfg["image_column"], cfg["label_column"]):
        if column not in data.column_names:
            raise DataError(f"'{cfg['id']}' has no column '{column}'; it has {data.column_names}.")
    labels = np.asarray(data[cfg["label_column"]])
    kind = data.features[cfg["label_column"]]
    classes = list(kind.names) if isinstance(kind, datasets.ClassLabel) else [str(c) for c in np.unique(labels)]
    if not isinstance(kind, datasets.ClassLabel):
        labels = np.searchsorted(np.unique(labels), labels)
    index = np.arange(len(data))
    if names.get(split) is None or (split == "train" and None in (names.get("val"), names.get("test"))):
        shares = {"train": 1.0} | {s: cfg["held_out"] for s in ("val", "test") if names.get(s) is None}
        shares["train"] -= sum(v for s, v in shares.items() if s != "train")
        index = split_indices(labels, shares, cfg["seed"])[split]
    chosen = data.select(index).with_format(None)
    stem = data._fingerprint
    return ImageData(
        name=cfg["name"],
        split=split,
        class_names=classes,
        labels=labels[index],
        image_ids=[f"{source}-{i:08d}" for i in index],
        read=lambda i: chosen[int(i)][cfg["image_column"]],
        content=lambda i: stem.encode(),
    )
