"""What lies in a run's folder, and a finished run opened once for all who read it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import ListConfig
from PIL import Image
from scipy.sparse import csr_matrix, load_npz, save_npz, vstack
from torch import Tensor
from tqdm.auto import tqdm

from sae_lightning.backbones.backbone import Backbone
from sae_lightning.backbones.registry import load_backbone
from sae_lightning.data import DataError, ImageData
from sae_lightning.features.source import Source
from sae_lightning.features.store import FeatureStore
from sae_lightning.files import file_sha256, read_json, whole, write_bytes
from sae_lightning.runs.scores import read_rows
from sae_lightning.saes import SAE
from sae_lightning.saes.artefact import ArtefactError, read_cfg

# the files in a run's folder: what training leaves there, what evaluating adds, and what the state is read from
CFG, WEIGHTS, RESULT, HISTORY = "cfg.json", "sae.safetensors", "result.json", "history.csv"
SCORES, LATENTS, TOP_IMAGES, BAND_IMAGES = (
    "scores.json", "latents.safetensors", "top_images.safetensors", "bands.safetensors"
)  # fmt: skip
APPS, LOCK, FAILED, NOTES = "apps", ".lock", "failed.json", ("resolved.yaml", "meeting.json", "rendezvous.json")
CHECKPOINTS, LAST, BEFORE = "checkpoints", "last.ckpt", "before.ckpt"

PRODUCTS = (RESULT, WEIGHTS, CFG)  # without which a run is not finished
FILES = (SCORES, LATENTS, TOP_IMAGES, BAND_IMAGES)  # what evaluating leaves

TOKENS = 8192  # encoded at once


class Run:
    """The run in ``folder``, as all who read one see it; everything is read when it is first asked for, and kept.

    ``cfg`` is its cfg.json, which it must have, else ArtefactError.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        self.cfg: dict[str, Any] = read_cfg(folder)
        self._images: dict[str, ImageData] = {}
        self._codes: dict[str, csr_matrix] = {}
        self._features: dict[str, np.ndarray] = {}

    def __repr__(self) -> str:
        """For example ``Run(batchtopk-dinov2-x8-k32-s42-1a2b3c4d: dinov2 · batchtopk ×8)``."""
        return f"Run({self.name}: {self.label})"

    @property
    def config(self) -> dict[str, Any]:
        """The config that it was trained with; ArtefactError for an SAE of other hands."""
        if "config" not in self.cfg:
            raise ArtefactError(f"{self.folder / CFG} holds no config: that SAE was not trained here; leave it out.")
        return self.cfg["config"]

    @property
    def label(self) -> str:
        """The run in a few words: ``clip (tiny) embedding · msae ×8``."""
        kind = "" if self.cfg["features"] == "patch" else f" {self.cfg['features']}"
        return f"{self.cfg['backbone']}{kind} · {self.cfg['variant']} ×{self.cfg['expansion']:g}"

    @cached_property
    def result(self) -> dict[str, Any]:
        """What training says of itself: seconds, steps, … and the scores ``val``."""
        return read_json(self.folder / RESULT, "train the run again", ArtefactError)

    @cached_property
    def scores(self) -> dict[str, Any]:
        """What evaluating says in ``scores.json``: the split, its ``metrics``, …; ArtefactError where it has not."""
        path = self.folder / SCORES
        return read_json(path, f"make it anew: python evaluate.py runs={self.name}", ArtefactError)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of ``scores.parquet``, none where there is none; ArtefactError where it is damaged."""
        return read_rows(self.folder, strict=True)

    @cached_property
    def source(self) -> Source:
        """Where the features come from that the SAE was trained on."""
        return Source.of(self.config)

    @cached_property
    def sae(self) -> SAE:
        """The SAE, on the CPU, in evaluation mode."""
        return SAE.load(self.folder)

    @cached_property
    def backbone(self) -> Backbone:
        """The encoder whose features it was trained on; BackboneError when its weights cannot be had."""
        if self.source.data["source"] == "synthetic":
            raise self._pictureless
        return load_backbone(self.source.backbone)

    def images(self, split: str) -> ImageData:
        """The pictures of ``split``; DataError where the run knows only a store, or a stream."""
        if split not in self._images:
            if self.source.given:
                raise self._pictureless
            images = self.source.images(split)
            if not isinstance(images, ImageData):
                raise DataError(
                    f"{self.name} was trained on a stream of pictures, which cannot be shown by number; set "
                    "data.streaming=false."
                )
            self._images[split] = images
        return self._images[split]

    @property
    def _pictureless(self) -> DataError:
        return DataError(
            f"{self.name} was trained on features alone, without pictures; train on an image data set (data=…)."
        )

    def store(self, split: str, kind: str | None = None) -> FeatureStore:
        """Features of ``split``, of the kind that the SAE was trained on or of another; extracted if missing."""
        return self.source.replace(features=kind or self.source.features).store(split)

    def features(self, split: str) -> np.ndarray:
        """Raw features of whole images, [n, d_in] float32: of patch tokens their mean."""
        if split not in self._features:
            store = self.store(split)
            step = max(1, TOKENS // store.n_patches)
            parts = [store.features(slice(i, i + step)).float().mean(1) for i in range(0, len(store), step)]
            self._features[split] = torch.cat(parts).numpy()
        return self._features[split]

    def codes(self, split: str) -> csr_matrix:
        """Codes of whole images, [n, d_sae] float32: of patch tokens the maximum of every latent.

        Kept in the run's ``apps`` folder for the next application, 8 bytes an active latent.
        """
        if split not in self._codes:
            store = self.store(split)
            key = hashlib.sha256(f"{store.fingerprint}|{file_sha256(self.folder / WEIGHTS)}".encode())
            kept = self.folder / APPS / f"codes-{split}-{key.hexdigest()[:12]}.npz"
            if kept.is_file():
                self._codes[split] = load_npz(kept)
            else:
                self._codes[split] = self.encode_images(store, np.arange(len(store)))
                _keep(kept, f"codes-{split}-*.npz", self._codes[split])
        return self._codes[split]

    def encode_images(self, store: FeatureStore, places: np.ndarray) -> csr_matrix:
        """Codes of the images of ``store`` at ``places`` [n], pooled by maximum, in that order."""
        step = max(1, TOKENS // store.n_patches)
        parts = []
        for i in tqdm(range(0, len(places), step), desc=f"Encoding {self.name}", unit="batch", leave=False):
            parts.append(self.encode(store.features(places[i : i + step])))
        return vstack(parts, format="csr")

    @torch.no_grad()
    def encode(self, features: Tensor) -> csr_matrix:
        """Codes [n, d_sae] of images from their raw features [n, P, d_in], pooled by maximum."""
        return self.sae.encode(features.float()).pool(features.shape[1]).csr()

    def picture_features(self, image: Image.Image, device: str = "cpu") -> Tensor:
        """Raw features [1, P, d_in] float32 of any RGB picture, of the kind that the SAE was trained on."""
        backbone, tap = self.backbone.to(device), self.source.tap
        features = backbone.forward_features(backbone.transform(image)[None].to(device), [tap])[tap].cpu().float()
        return features if features.ndim == 3 else features[:, None]

    def results(self, app: str) -> Path:
        """Where the application ``app`` leaves what it finds of this run."""
        return self.folder / APPS / app


def shared_results(runs: Sequence[Run], app: str, otherwise: str | Path) -> Path:
    """Where ``app`` leaves what it finds of several ``runs``: beside them, or below ``otherwise`` if they lie apart."""
    parents = {run.folder.parent for run in runs}
    return (parents.pop() if len(parents) == 1 else Path(otherwise)) / APPS / app


def _keep(path: Path, earlier: str, codes: csr_matrix) -> None:
    """Write ``codes`` to ``path`` and remove the ``earlier`` ones (a pattern); a folder that refuses is no error."""
    content = io.BytesIO()
    save_npz(content, codes, compressed=False)
    try:
        path.parent.mkdir(exist_ok=True)
        old = [file for file in path.parent.glob(earlier) if file != path]
        write_bytes(path, content.getbuffer())
        for file in old:
            file.unlink(missing_ok=True)
    except OSError:
        return


def is_finished(folder: Path, products: Sequence[str] = PRODUCTS) -> bool:
    """Whether ``folder`` holds a whole run; ``result.json`` is written last."""
    return all(whole(folder / name) for name in products)


def find_runs(patterns: str | Iterable[str], folder: Path) -> list[Path]:
    """Finished run folders below ``folder`` whose names match ``patterns`` (one or several), sorted.

    Raises FileNotFoundError with a sentence when there is none.
    """
    patterns = [str(patterns)] if isinstance(patterns, str | int | float) else [str(pattern) for pattern in patterns]
    try:
        found = {p for pattern in patterns for p in folder.glob(pattern) if (p / RESULT).is_file()}
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{', '.join(patterns)} is no pattern of names below {folder} ({error}); name runs as in batchtopk-*."
        ) from error
    if not found:
        raise FileNotFoundError(f"No finished run in {folder} matches {', '.join(patterns)}; train one with train.py.")
    return sorted(found)


def chosen_runs(wanted: str | Iterable[str], folder: Path) -> list[Path]:
    """The finished runs that ``wanted`` names: folders or patterns of them, or names or patterns of names below
    ``folder``; one or several.

    FileNotFoundError with a sentence when one names no finished run.
    """
    several = list(wanted) if isinstance(wanted, (list, tuple, ListConfig)) else [str(wanted)]
    found: list[Path] = []
    for one in several:
        paths = sorted(Path(path) for path in glob(one) if (Path(path) / RESULT).is_file())
        if not paths and Path(one).is_absolute():
            raise FileNotFoundError(f"No finished run is {one}; give the folder of one that train.py has finished.")
        found += paths or find_runs(one, folder)
    return list(dict.fromkeys(found))
