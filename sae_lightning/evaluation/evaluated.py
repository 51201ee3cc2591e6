"""A run after its passes: what the parts of the benchmark ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from omegaconf import DictConfig
from scipy.sparse import csr_matrix

from sae_lightning.backbones.registry import load_backbone
from sae_lightning.data import ImageData
from sae_lightning.data.masks import load_masks
from sae_lightning.data.siblings import Groups, sibling_groups
from sae_lightning.evaluation.core import write_summary
from sae_lightning.evaluation.scoring_pass import ScoringPass
from sae_lightning.features.manifest import StoreError
from sae_lightning.features.store import FeatureStore
from sae_lightning.metrics.part import MAIN
from sae_lightning.metrics.segmentation import Sets
from sae_lightning.saes import SAE, Normalizer

if TYPE_CHECKING:
    from sae_lightning.evaluation.job import Job

T = TypeVar("T")


@dataclass(frozen=True)
class ImageFeatures:
    """Features of whole images, the maximum over their patches each, in ``Evaluated.frame``.

    ``raw`` and ``reconstruction`` [n, d_in] float32, ``codes`` [n, d_sae] float32, ``labels`` [n] int64.
    """

    raw: np.ndarray
    reconstruction: np.ndarray
    codes: csr_matrix
    labels: np.ndarray
    class_names: list[str]


class Evaluated:
    """One run with its finished ``passes`` by name; ``shared`` is what all runs of its backbone have in common."""

    def __init__(self, job: Job, passes: Mapping[str, ScoringPass], shared: dict[str, Any]) -> None:
        self.job, self.passes, self._shared = job, passes, shared
        self._images: dict[str, ImageFeatures] = {}
        self._summary: dict[str, Any] | None = None

    @property
    def config(self) -> DictConfig:
        """The config that the run was trained with."""
        return self.job.config

    @cached_property
    def sae(self) -> SAE:
        """The SAE, on the CPU."""
        return SAE.load(self.job.run)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.job.run

    @property
    def device(self) -> str:
        """Where products are computed."""
        return self.job.settings.device

    def store(self, name: str) -> FeatureStore:
        """The store of the pass ``name``."""
        return self.job.store(name)

    @cached_property
    def frame(self) -> Normalizer:
        """Centring and scaling by the statistics of the scored store, in which features are compared and probed.

        Other data sets than the run's own are put into it, too [ViSAEBench Table 2, M6]. It is the store's and not the
        SAE's, so that an SAE with its normaliser folded into the weights has the same scores.
        """
        store = self.store(MAIN)
        return Normalizer(store.d_in, store.mean, store.std)

    def judge(self, part: str) -> FeatureStore | None:
        """The store of the encoder that says how alike images are for ``part``; None when the scored features do."""
        return self.job.judge_of(next(p for p in self.job.parts if p.name == part))

    def summary(self) -> dict[str, Any]:
        """scores.json and what belongs to single latents, written at the first call."""
        if self._summary is None:
            core = self.job.settings.metrics.core
            self._summary = write_summary(
                self.passes[MAIN], self.job.settings.latents_shown, core.above, core.bands.ranks, core.bands.images,
                anew=False,
            )  # fmt: skip
        return self._summary

    def sibling_groups(self) -> Groups:
        """Groups of classes that are siblings: those of the data set, or ImageNet's where the classes are its own."""
        source = self.job.source
        images = None if source.given else source.images(self.job.settings.split)
        if isinstance(images, ImageData):
            return images.sibling_groups
        return sibling_groups(self.store(MAIN).class_names, source.data.get("siblings"))

    def masked(self, name: str) -> Sets:
        """Patch features and masks of the data set ``name``."""

        def make() -> Sets:
            source = self.job.set_source(name)
            transform = load_backbone(source.backbone).transform
            masks = [load_masks(source.data, split, transform) for split in ("train", "test")]
            return Sets(self.store(f"{name}/train"), self.store(f"{name}/test"), *masks)

        return self.shared(f"masks {name}", make)

    def texts(self) -> ImageFeatures | None:
        """The captions of the images, in their order, through the text tower and the SAE; None without captions.

        Both modalities have statistics of their own [MSAE]: captions are moved and scaled so that those of the train
        split have the mean and deviation of its images, which is what the SAE was trained on. ``labels`` tell different
        captions apart.
        """
        source, split = self.job.source, self.job.settings.split
        if source.given:
            return None
        images, captions = source.images(split), source.replace(features="text")
        if not isinstance(images, ImageData) or images.captions is None:
            return None
        store = captions.store(split)
        places, missing = store.find(self.store(MAIN).image_ids)
        if missing:
            raise StoreError(f"{store.folder} lacks the text of {len(missing)} images; extract it again.")
        of_text, of_images = (
            Normalizer(train.d_in, train.mean, train.std) for train in (captions.store("train"), source.store("train"))
        )
        features = of_images.denormalize(of_text.normalize(store.features(places)[:, 0]))
        with torch.no_grad():
            codes = self.sae.encode(features)
            raw, rebuilt = (self.frame.normalize(x).numpy() for x in (features, self.sae.decode(codes)))
        ids = np.unique(np.asarray(store.captions, dtype=object)[places], return_inverse=True)[1]
        return ImageFeatures(raw, rebuilt, codes.csr(), ids, [])

    def images(self, name: str) -> ImageFeatures:
        """What the pass ``name`` gathered of whole images."""
        if name not in self._images:
            done = self.passes[name]
            raw, reconstruction = (
                self.frame.normalize(torch.from_numpy(np.array(done.pools[kind].mapped()))).numpy()
                for kind in ("raw", "reconstruction")
            )
            labels, classes = done.store.labels.numpy(), done.store.class_names
            self._images[name] = ImageFeatures(raw, reconstruction, done.codes.matrix(), labels, classes)
        return self._images[name]

    def shared(self, name: str, make: Callable[[], T]) -> T:
        """What ``make`` gives for the backbone, made once for all of its runs."""
        key = f"{name}|{self.store(MAIN).fingerprint}"
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]
