"""What one SAE gathers while its store streams by once: sums of metrics, codes and features of whole images."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_lightning.evaluation.by_latent import strongest
from sae_lightning.evaluation.image_codes import ImageCodes, RowFile
from sae_lightning.evaluation.similarity import ImageEmbeddings
from sae_lightning.features.manifest import StoreError
from sae_lightning.features.store import FeatureStore
from sae_lightning.files import set_aside, write_tensors
from sae_lightning.metrics.base import SumMetric, of_one_rank
from sae_lightning.metrics.part import TopImages
from sae_lightning.registry import one_of
from sae_lightning.saes import SAE
from sae_lightning.saes.artefact import ArtefactError, read_cfg, read_tensors

STATE = "state.safetensors"
# inputs that a metric may name
STREAMED = ("features", "reconstruction", "codes", "patch_codes", "image_codes", "labels", "embeddings")
JOINT = ("embedding", "text")  # images and texts in one space
TOP = 16  # strongest images of a latent that are looked for at once


class ScoringPass:
    """The SAE of ``run`` over the images ``span`` of ``store``, kept in ``folder`` so that another process goes on.

    It feeds ``metrics`` with the inputs that each names, keeps the codes of whole images, and for each of ``pools``
    ("max", "mean") that of an image's features and of their reconstruction over its patches. ``judge`` gives
    embeddings. ``sae`` is that of the run by default, ``out`` where its summary is written the run's folder.
    Raises StoreError when the store is of another backbone, layer or width than the SAE.
    """

    def __init__(
        self, run: Path, store: FeatureStore, judge: ImageEmbeddings, folder: Path, metrics: Mapping[str, SumMetric],
        pools: Sequence[str] = (), span: range | None = None, device: str = "cpu", sae: SAE | None = None,
        out: Path | None = None,
    ) -> None:  # fmt: skip
        check_store(run, store)
        self.run, self.store, self.judge, self.folder, self.device = run, store, judge, folder, device
        self.out = out or run
        self.span = range(len(store)) if span is None else span
        self.sae = (SAE.load(run) if sae is None else sae).to(device)
        self.metrics = {name: of_one_rank(metric).to(device) for name, metric in metrics.items()}
        self._inputs = {one_of(i, STREAMED, "inputs") for metric in metrics.values() for i in metric.inputs}
        self._inputs |= {"reconstruction"} if pools else set()
        self.done = self._load()  # images of the span
        self.codes = ImageCodes(self.sae.d_sae, folder, self.done)
        self.pools = {
            (name, pool): RowFile(folder / f"{name}-{pool}.f32", np.float32, self.sae.d_in, self.done)
            for pool in pools for name in ("features", "reconstruction")
        }  # fmt: skip
        self._top: TopImages | None = None

    def top(self, n: int) -> TopImages:
        """The ``n`` strongest images of each latent, once all have been seen."""
        if self._top is None or self._top.images.shape[1] < n:
            self._top = strongest(self.codes.batches(), self.sae.d_sae, max(n, TOP))
        return TopImages(self._top.images[:, :n], self._top.values[:, :n], self._top.fired)

    def bytes(self) -> int:
        """Memory that weights and sums hold."""
        tensors = list(self.sae.state_dict().values())
        tensors += [t for metric in self.metrics.values() for t in states(metric).values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    # --- streaming ------------------------------------------------------------------------------------
    @property
    def next(self) -> int:
        """The image of the store that it waits for; the span's end when it has seen all."""
        return self.span.start + self.done

    @property
    def finished_whole(self) -> bool:
        """Whether it has seen all images of the store."""
        return self.done == len(self.store)

    @torch.no_grad()
    def add(self, first: int, read: Tensor) -> None:
        """Take in the images of the store from ``first`` on, with their features [n, P, d_in]; those seen are skipped.

        ValueError when images between the last one seen and ``first`` are left out.
        """
        if first > self.next:
            raise ValueError(f"Images {self.next} to {first} were left out.")
        read = read[self.next - first :]
        if not len(read):
            return
        images = slice(self.next, self.next + len(read))
        features = read.to(self.device).reshape(-1, self.sae.d_in).float()
        codes = self.sae.encode(features)
        pooled = codes.pool(self.store.n_patches, "max")
        given: dict[str, Any] = {"features": features, "codes": codes, "image_codes": pooled}
        if "patch_codes" in self._inputs:
            given["patch_codes"] = codes.without_first(self.store.prefix, self.store.n_patches)
        if "reconstruction" in self._inputs:
            given["reconstruction"] = self.sae.decode(codes)
        if "labels" in self._inputs:
            given["labels"] = self.store.labels[images].to(self.device)
        if "embeddings" in self._inputs:
            given["embeddings"] = self.judge.embeddings(images, read).to(self.device)
        for metric in self.metrics.values():
            metric.update(*(given[name] for name in metric.inputs))
        self.codes.append(pooled)
        for (name, pool), file in self.pools.items():
            images_of = given[name].unflatten(0, (-1, self.store.n_patches))
            file.append((images_of.amax(1) if pool == "max" else images_of.mean(1)).cpu().numpy())
        self.done += len(read)

    # --- on disk --------------------------------------------------------------------------------------
    def save(self) -> None:
        """Bring everything to the disk, so that a later object in the same folder goes on from here."""
        for file in (*self.codes.files, *self.pools.values()):
            file.sync()
        tensors = {f"{m}.{s}": t.cpu() for m, metric in self.metrics.items() for s, t in states(metric).items()}
        write_tensors(self.folder / STATE, tensors, {"images": json.dumps(self.done)})

    def _load(self) -> int:
        path = self.folder / STATE
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            return 0
        try:
            tensors, metadata = read_tensors(path)
        except ArtefactError as error:
            set_aside(path, str(error), f"{self.run.name} is scored anew")
            return 0
        for name, metric in self.metrics.items():
            metric.merge_state(_part(tensors, name, self.device))
            metric._update_count = 1  # else compute() warns that there was no update
        return json.loads(metadata["images"])

    def merge(self, other: ScoringPass) -> None:
        """Add what ``other`` gathered of the images after this one's."""
        for name, metric in self.metrics.items():
            metric.merge_state(states(other.metrics[name]))
            metric._update_count = 1
        self.codes.extend(other.codes)
        for key, file in self.pools.items():
            file.append(other.pools[key].mapped())
        self.span = range(self.span.start, other.span.stop)
        self.done += other.done

    def close(self) -> None:
        """Close the files, which stay."""
        for file in (*self.codes.files, *self.pools.values()):
            file.close()


def states(metric: SumMetric) -> dict[str, Tensor]:
    """A metric's states, all of which are tensors."""
    return {name: torch.as_tensor(state) for name, state in metric.metric_state.items()}


def check_store(run: Path, store: FeatureStore) -> None:
    """StoreError unless ``store`` holds what the SAE of ``run`` was trained on, of whatever images, or texts."""
    cfg = read_cfg(run)
    kind = store.kind if {store.kind, cfg["features"]} == set(JOINT) else cfg["features"]
    made_for = (cfg["backbone"], kind, cfg["layer"], cfg["d_in"], cfg.get("site", "block"))
    found = (store.backbone, store.kind, store.layer, store.d_in, store.site)
    if made_for != found:
        raise StoreError(
            f"{run.name} was trained on (backbone, features, layer, d_in, site) = {made_for}; the store "
            f"{store.folder} holds {found}. Evaluate it on a store of its own backbone."
        )


def _part(tensors: Mapping[str, Tensor], name: str, device: str = "cpu") -> dict[str, Tensor]:
    """The entries ``name.…`` without that prefix."""
    return {key.partition(".")[2]: t.to(device) for key, t in tensors.items() if key.partition(".")[0] == name}


def stream(
    passes: Sequence[ScoringPass], batch_tokens: int = 4096, checkpoint_minutes: float = 5, title: str = "Scoring"
) -> None:
    """Let all ``passes``, of one store and span, see their images; those that an earlier process saw are not read.

    Every ``checkpoint_minutes`` and at the end everything is brought to the disk.
    """
    store, stop = passes[0].store, passes[0].span.stop
    start = min(each.next for each in passes)
    images = max(1, batch_tokens // store.n_patches)
    saved, fresh = time.monotonic(), False
    with tqdm(total=len(passes[0].span), initial=start - passes[0].span.start, desc=title, unit=" images",
              leave=False) as bar:  # fmt: skip
        for first, read in batches(store, start, stop, images):
            for each in passes:
                each.add(first, read)
            bar.update(len(read))
            fresh = True
            if time.monotonic() - saved > 60 * checkpoint_minutes:
                save(passes)
                saved, fresh = time.monotonic(), False
    if fresh:
        save(passes)


def save(passes: Sequence[ScoringPass]) -> None:
    """Bring all ``passes`` to the disk."""
    for each in passes:
        each.save()


def batches(
    store: FeatureStore, start: int, stop: int, images: int, title: str | None = None
) -> Iterator[tuple[int, Tensor]]:
    """The images ``start`` to ``stop`` of a store, ``images`` at a time, the next batch read while one is used.

    With a ``title`` a progress bar is shown.
    """
    spans = [slice(first, min(stop, first + images)) for first in range(start, stop, images)]
    bar = tqdm(spans, title, unit="batch", leave=False, disable=title is None)
    with ThreadPoolExecutor(1, "reader") as pool:
        ahead = pool.submit(store.features, spans[0]) if spans else None
        for i, span in enumerate(bar):
            assert ahead is not None
            read = ahead.result()
            ahead = pool.submit(store.features, spans[i + 1]) if i + 1 < len(spans) else None
            yield span.start, read
