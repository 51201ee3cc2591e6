"""What is searched for: pictures of the data set, by number or id, or picture files of one's own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy.sparse import csr_matrix
from torch import Tensor

from sae_lightning.apps.opened import Opened
from sae_lightning.data import ImageData
from sae_lightning.data.decode import to_rgb


@dataclass(frozen=True)
class Query:
    """A picture with its raw features [1, P, d_in] and pooled codes [1, d_sae].

    ``index`` is its place in the gallery, -1 for a picture of one's own, whose ``label`` is -1 too.
    """

    title: str
    image: Image.Image
    features: Tensor
    codes: csr_matrix
    index: int = -1
    label: int = -1

    @property
    def pooled(self) -> np.ndarray:
        """The mean of its tokens, [1, d_in] float32."""
        return self.features.float().mean(1).numpy()


def queries_of(
    opened: Opened, split: str, wanted: str | int | Iterable[str | int] | None, shown: int = 4, seed: int = 42
) -> list[Query]:
    """The queries that ``wanted`` names: numbers or ids of images of ``split``, or picture files; one or several.

    None: ``shown`` images drawn by ``seed``, of different classes as far as there are. ValueError for a name that is
    none of these.
    """
    images = opened.images(split)
    if wanted is None:
        return [_of_data(opened, split, i) for i in drawn(images.labels, shown, seed)]
    several = [wanted] if isinstance(wanted, (str, int)) else list(wanted)
    return [_query(opened, split, images, one) for one in several]


def drawn(labels: np.ndarray, n: int, seed: int) -> list[int]:
    """``n`` images by ``seed``, one of each class before a second of any."""
    order = np.random.default_rng(seed).permutation(len(labels))
    ordered = pd.Series(labels[order])
    turn = ordered.groupby(ordered).cumcount().to_numpy()  # first, second … of its class
    return order[np.argsort(turn, kind="stable")[:n]].tolist()


def _query(opened: Opened, split: str, images: ImageData, one: str | int) -> Query:
    if isinstance(one, str) and one in images.image_ids:
        return _of_data(opened, split, images.image_ids.index(one))
    if str(one).isdecimal() and int(one) < len(images):
        return _of_data(opened, split, int(one))
    path = Path(str(one)).expanduser()
    if not path.is_file():
        raise ValueError(
            f"app.queries={one} is neither a number below {len(images)} or an image id of the {split} split nor a "
            "picture file; give one of these."
        )
    image = to_rgb(path, str(one))
    features = opened.picture_features(image)
    return Query(path.name, image, features, opened.encode(features))


def _of_data(opened: Opened, split: str, index: int) -> Query:
    images = opened.images(split)
    features = opened.store(split).features(torch.tensor([index])).float()
    label = int(images.labels[index])
    title = f"{images.class_names[label]} · {images.image_ids[index]}"
    return Query(title, images[index], features, opened.encode(features), index, label)
