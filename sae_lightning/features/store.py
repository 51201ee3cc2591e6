"""Reading a feature store: one folder of safetensors shards with one kind of feature of one split.

```
stores/demo/dinov2-tiny/patch-L4/train-1a2b3c4d/
    manifest.json            counts, shapes, checksums, fingerprint; written last
    statistics.safetensors   mean [d_in], deviation [d_in], both float64
    images.parquet           image_id, label (and caption, for text)
    shard-00000.safetensors  features [n, P, d_in]
    records/00000.json       what the shard holds, its checksums and moments
```
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_lightning.data.splits import UNLABELLED, class_name, split_indices
from sae_lightning.features.codec import DELIVERED, Frame, decode, header, layout
from sae_lightning.features.manifest import Manifest, StoreError, merge, read_record
from sae_lightning.features.shard import check_shard, read_rows
from sae_lightning.files import data_sha256, file_sha256
from sae_lightning.registry import one_of

Index = slice | Tensor | np.ndarray | Sequence[int]

DAMAGED = ("refuse", "skip")


class FeatureStore:
    """A sealed store, or a part of its images without a copy.

    ``mean``, ``deviation`` [d_in] and ``std`` are those of the whole store, also in a part of it. ``skipped`` names the
    damaged shards that ``open`` was told to leave out.
    """

    def __init__(self, folder: Path, manifest: Manifest, images: np.ndarray | None = None) -> None:
        self.folder, self.manifest = folder, manifest
        self.backbone, self.kind, self.layer = manifest.backbone, manifest.kind, manifest.layer
        self.site, self.prefix = manifest.site, manifest.prefix
        self.data, self.split, self.grid = manifest.data, manifest.split, manifest.grid
        self.n_patches, self.d_in, self.class_names = manifest.n_patches, manifest.d_in, manifest.class_names
        self.dtype = DELIVERED[manifest.dtype]
        self.skipped: list[str] = []
        self.std: float = manifest.std
        self._images = images
        self._numbers: np.ndarray | None = None  # of the manifest's classes among ``class_names``
        self._starts = np.cumsum([0, *(shard.images for shard in manifest.shards)])
        if images is not None:  # where runs of consecutive images begin, as positions in ``images``
            self._runs = np.append(np.flatnonzero(np.diff(images, prepend=-2) != 1), len(images))

    def __repr__(self) -> str:
        """For example ``FeatureStore(4,000 x 256 x 384 float16, patch layer 10 of dinov2-s, imagenette train)``."""
        place = self.kind if self.layer is None else f"{self.kind} layer {self.layer}"
        place += "" if self.site == "block" else f" {self.site}"
        shape = f"{len(self):,} x {self.n_patches} x {self.d_in} {self.manifest.dtype}"
        return f"FeatureStore({shape}, {place} of {self.backbone}, {self.data} {self.split})"

    @classmethod
    def open(cls, folder: str | Path, damaged: str = "refuse", verify: bool = False) -> FeatureStore:
        """The store in ``folder``.

        Checks the schema, all sizes and headers and the ends of every shard; with ``verify`` every byte. A damaged
        or missing shard is refused with its name, or with ``damaged="skip"`` left out with a warning that counts.
        Raises StoreError.
        """
        one_of(damaged, DAMAGED, "stream.damaged", StoreError)
        folder = Path(folder)
        store = cls(folder, Manifest.read(folder))
        for error in store.damaged_files().values():
            raise error
        bad = store.damage(verify)
        if bad and damaged == "refuse":
            raise next(iter(bad.values()))
        return store._without(bad) if bad else store

    def damaged_files(self) -> dict[str, StoreError]:
        """What is wrong with the files beside the shards, by name."""
        found = {}
        for name, digest in self.manifest.files.items():
            path = self.folder / name
            if not path.is_file():
                found[name] = f"{self.folder} lacks {name}"
            elif file_sha256(path) != digest:
                found[name] = f"{path} was changed"
        advice = "Run extract.py again, which makes it anew from the records."
        return {name: StoreError(f"{what}. {advice}") for name, what in found.items()}

    def damage(self, verify: bool = False) -> dict[int, StoreError]:
        """What is wrong, by shard: by the cheap checks, and with ``verify`` also by every shard's SHA-256."""
        m = self.manifest

        def check(i: int) -> StoreError | None:
            path = self.folder / m.shards[i].file
            try:
                check_shard(path, m.shards[i], m.n_patches, m.d_in, m.dtype)
                if verify and m.shards[i].images and data_sha256(path, self._data_start(i)) != m.shards[i].sha256:
                    raise StoreError(
                        f"{path} does not match its checksum. Remove it with 'sae-lightning store verify --mend' and "
                        "run extract.py again, which redoes this shard alone, or skip it with stream.damaged=skip."
                    )
            except StoreError as error:
                return error
            return None

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(check, range(len(m.shards))))
        return {i: error for i, error in enumerate(found) if error is not None}

    def verify(self) -> None:
        """Read every byte and compare; StoreError names the first shard that differs."""
        for error in self.damage(verify=True).values():
            raise error

    # --- what it holds ------------------------------------------------------------------------------
    def __len__(self) -> int:
        """Images."""
        return self.manifest.n_images if self._images is None else len(self._images)

    @property
    def places(self) -> np.ndarray:
        """Where its images lie among all of the folder, [n_images] int64."""
        return np.arange(len(self)) if self._images is None else self._images

    @property
    def n_tokens(self) -> int:
        """Tokens of all images."""
        return len(self) * self.n_patches

    @property
    def spatial(self) -> bool:
        """Whether the tokens behind the first ``prefix`` are patches in a ``grid``."""
        return self.grid[0] * self.grid[1] > 1

    @property
    def labelled(self) -> bool:
        """Whether the images have classes."""
        return self.class_names != [UNLABELLED]

    @cached_property
    def _statistics(self) -> dict[str, Tensor]:
        return load_file(self.folder / "statistics.safetensors")

    @property
    def mean(self) -> Tensor:
        """[d_in] float32."""
        return self._statistics["mean"].float()

    @property
    def deviation(self) -> Tensor:
        """[d_in] float32, of each dimension."""
        return self._statistics["deviation"].float()

    def _column(self, name: str) -> np.ndarray:
        column = pq.read_table(self.folder / "images.parquet", columns=[name])[name].to_numpy()
        return column if self._images is None else column[self._images]

    @cached_property
    def image_ids(self) -> list[str]:
        """One an image."""
        return self._column("image_id").tolist()

    def find(self, image_ids: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """Positions [m] int64 of the images of these ids, and the ids that are not here, which have no position."""
        where = {image_id: i for i, image_id in enumerate(self.image_ids)}
        places = [where[image_id] for image_id in image_ids if image_id in where]
        return np.array(places, dtype=np.int64), [image_id for image_id in image_ids if image_id not in where]

    @cached_property
    def labels(self) -> Tensor:
        """[n_images] int64, indices of ``class_names``."""
        labels = self._column("label")
        return torch.from_numpy(labels.copy() if self._numbers is None else self._numbers[labels])

    @cached_property
    def captions(self) -> list[str]:
        """The text of each image, in a store of text."""
        return self._column("caption").tolist()

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of what made the store, and of which of its images these are."""
        if self._images is None:
            return self.manifest.fingerprint
        return hashlib.sha256(self.manifest.fingerprint.encode() + self._images.tobytes()).hexdigest()

    # --- parts --------------------------------------------------------------------------------------
    def select(self, images: np.ndarray) -> FeatureStore:
        """The images at these positions (ascending, without repeats), as a store of their own; nothing is copied."""
        images = np.asarray(images, dtype=np.int64)
        if len(images) == 0:
            raise StoreError(f"No image of {self.folder} is left in this subset; widen it.")
        physical = images if self._images is None else self._images[images]
        part = FeatureStore(self.folder, self.manifest, physical)
        part.skipped, part.std, part._statistics = self.skipped, self.std, self._statistics
        part.class_names, part._numbers = self.class_names, self._numbers
        return part

    def numbered_as(self, class_names: Sequence[str]) -> FeatureStore:
        """The same images with labels that index ``class_names``, after which come the classes that these lack.

        Where either has no classes, there is nothing to number.
        """
        names = list(dict.fromkeys([*class_names, *self.class_names]))
        if names == self.class_names or [UNLABELLED] in (list(class_names), self.class_names):
            return self
        numbers = np.array([names.index(name) for name in self.class_names], dtype=np.int64)
        part = copy.copy(self)
        part.__dict__.pop("labels", None)
        part.class_names, part._numbers = names, numbers if self._numbers is None else numbers[self._numbers]
        return part

    def subset(
        self, images: int | None = None, per_class: int | None = None, classes: Sequence[object] | None = None,
        seed: int = 42,
    ) -> FeatureStore:  # fmt: skip
        """At most ``images`` images (drawn by ``seed``), ``per_class`` of each class, of ``classes`` (names) only."""
        kept = np.arange(len(self))
        labels = self.labels.numpy()
        rng = np.random.default_rng(seed)
        if classes is not None:
            own = [class_name(name) for name in self.class_names]
            names = [str(c) if str(c) in own else class_name(c) for c in classes]  # 0 means the class called "0"
            unknown = sorted(set(names) - set(own))
            if unknown:
                raise StoreError(f"{self.folder} has no class {unknown}; it has {self.class_names[:20]}.")
            kept = kept[np.isin(labels, [i for i, name in enumerate(own) if name in names])]
        if per_class is not None:
            members = [rng.permutation(kept[labels[kept] == c])[:per_class] for c in np.unique(labels[kept])]
            kept = np.sort(np.concatenate(members)) if members else kept
        if images is not None and images < len(kept):
            kept = np.sort(rng.permutation(kept)[:images])
        return self if len(kept) == len(self) else self.select(kept)

    def parts(self, shares: dict[str, float], seed: int = 42) -> dict[str, FeatureStore]:
        """Disjoint parts by name, stratified by class: ``{"train": 0.9, "val": 0.1}``."""
        index = split_indices(self.labels.numpy(), shares, seed)
        return {name: self.select(np.sort(images)) for name, images in index.items()}

    def _without(self, bad: dict[int, StoreError]) -> FeatureStore:
        shards = self.manifest.shards
        good = [i for i in range(len(shards)) if i not in bad and shards[i].images]
        lost = sum(shards[i].images for i in bad)
        warnings.warn(
            f"{self.folder}: {len(bad)} damaged of {len(shards)} shards are skipped, {lost} images: "
            f"{', '.join(shards[i].file for i in bad)}.",
            stacklevel=3,
        )
        spans = [np.arange(self._starts[i], self._starts[i + 1]) for i in good]
        part = self.select(np.concatenate([*spans, np.empty(0, np.int64)]))
        part.skipped = [shards[i].file for i in bad]
        moments = merge(read_record(self.folder, i).moments for i in good)
        part._statistics = {"mean": moments.mean, "deviation": (moments.m2 / moments.count).sqrt()}
        part.std = (moments.variance / (moments.count * self.d_in)) ** 0.5
        return part

    # --- reading ------------------------------------------------------------------------------------
    def features(self, index: Index) -> Tensor:
        """Raw features [n, P, d_in] of images, in the store's ``dtype``; a copy."""
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        images = np.asarray(index, dtype=np.int64)
        if len(images) and not (images.min() >= 0 and images.max() < len(self)):
            raise IndexError(f"Images {images.min()} to {images.max()} of a store of {len(self)}.")
        out = torch.empty(len(images), self.n_patches, self.d_in, dtype=self.dtype)
        buffer = out.reshape(len(images), self.n_patches * self.d_in).view(torch.uint8).numpy()
        order = np.argsort(images, kind="stable")
        for places in np.split(order, np.flatnonzero(np.diff(images[order]) != 1) + 1) if len(order) else ():
            straight = bool((np.diff(places) == 1).all())
            target = buffer[places[0] : places[-1] + 1] if straight else buffer
            self.read(int(images[places[0]]), len(places), target, None if straight else places, self.n_patches)
        return out

    def read(self, first: int, count: int, out: np.ndarray, places: np.ndarray | None, tokens: int = 1) -> None:
        """Rows of ``tokens`` tokens each (1, or n_patches for images), from row ``first``, as bytes into ``out``.

        Row i goes to ``out[places[i]]``, or in order where ``places`` is None. ``out`` [n, tokens · d_in · 2] uint8.
        Several threads may read at once.
        """
        for shard, at, n, done in self._pieces(first * tokens, count * tokens):
            begin, rows = done // tokens, n // tokens
            target = out[begin:] if places is None else out
            chosen = None if places is None else places[begin : begin + rows]
            if self.manifest.dtype == "int8":
                read = self._decoded(shard, at, n).reshape(rows, -1).view(torch.uint8).numpy()
                target[slice(rows) if chosen is None else chosen] = read
            else:
                start = self._data_start(shard) + at * self.d_in * 2
                read_rows(self.folder / self.manifest.shards[shard].file, start, target, chosen, rows)

    def _pieces(self, first: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        """(shard, first token in it, tokens, tokens before) of ``count`` tokens from token ``first`` on."""
        done = 0
        while done < count:
            image, token = divmod(first + done, self.n_patches)
            left = len(self) - image
            if self._images is not None:
                run = int(np.searchsorted(self._runs, image, side="right"))
                left, image = int(self._runs[run]) - image, int(self._images[image])
            shard = int(np.searchsorted(self._starts, image, side="right")) - 1
            left = min(left, int(self._starts[shard + 1]) - image)
            n = min(count - done, left * self.n_patches - token)
            yield shard, (image - int(self._starts[shard])) * self.n_patches + token, n, done
            done += n

    def _data_start(self, shard: int) -> int:
        m = self.manifest
        return len(header(m.shards[shard].images, m.n_patches, m.d_in, m.dtype))

    def _decoded(self, shard: int, at: int, n: int) -> Tensor:
        """float16 [n, d_in] of int8 tokens."""
        m, path = self.manifest, self.folder / self.manifest.shards[shard].file
        places = layout(m.shards[shard].images, m.n_patches, m.d_in, m.dtype)
        start = self._data_start(shard)

        def load(name: str, skip: int, count: int, width: int) -> Tensor:
            raw = torch.empty(count, width, dtype=torch.uint8)
            read_rows(path, start + places[name][2] + skip * width, raw.numpy(), None, count)
            return raw

        q = load("features", at, n, self.d_in).view(torch.int8)
        scale = load("scale", at, n, 4).view(torch.float32)[:, 0]
        frame = Frame(*(load(name, 0, 1, 4 * self.d_in).view(torch.float32)[0] for name in ("shift", "spread")))
        return decode(q, scale, frame)
