"""A run that is evaluated: its stores, which parts of the benchmark it lacks, and what these are computed of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from sae_lightning.backbones.backbone import BackboneError
from sae_lightning.backbones.registry import load_backbone
from sae_lightning.data import DataError, ImageData
from sae_lightning.data.masks import Masks, load_masks
from sae_lightning.data.siblings import Groups, released_groups, sibling_groups
from sae_lightning.evaluation.core import core_metrics, stored_scores, write_summary
from sae_lightning.evaluation.scoring_pass import JOINT, ScoringPass, batches, check_store
from sae_lightning.evaluation.similarity import ImageEmbeddings, SimilarityEncoder
from sae_lightning.features.manifest import StoreError
from sae_lightning.features.source import Source
from sae_lightning.features.store import FeatureStore
from sae_lightning.files import file_sha256
from sae_lightning.metrics.base import SumMetric
from sae_lightning.metrics.part import (
    CORE,
    MAIN,
    Dictionary,
    ImageFeatures,
    Options,
    Part,
    Streamed,
    TopImages,
    parts_of,
    plain,
)
from sae_lightning.runs.run import LATENTS
from sae_lightning.runs.scores import scores_of
from sae_lightning.saes import SAE, ArtefactError, Normalizer
from sae_lightning.saes.artefact import put_tensors, read_cfg, read_tensors, tensor_names

T = TypeVar("T")
M = TypeVar("M", bound=SumMetric)

PARTIAL = "evaluation.partial"

ON = "on"  # folder of what was found on other data sets than the run's own

OWN = SimilarityEncoder()

NEEDED = ("data", "backbone")  # sections of the config that a run was trained with

VERSION = 3  # of all parts; a change of one's figures raises it

GATHERED = 2  # of what passes keep on the disk; a change of a metric's states raises it


@dataclass(frozen=True)
class Settings:
    """How a call scores: ``metrics`` is the config group of that name; the rest is that of conf/evaluate.yaml."""

    metrics: DictConfig
    split: str = "test"
    similarity: SimilarityEncoder = OWN
    batch_tokens: int = 4096
    memory_gb: float = 4
    checkpoint_minutes: float = 5
    again: bool = False
    device: str = "cpu"
    latents_shown: int = 12
    stores: Path | None = None  # None: where each run's own are
    data: Mapping[str, Any] | None = None  # another data set; None: each run's own
    features: str | None = None  # embedding or text, where it is not what a run was trained on
    inference: str | None = None  # relu: without the selection of TopK and BatchTopK; None: as trained
    fingerprints: dict[str, str] = field(default_factory=dict)  # of stores, found while runs are looked at

    @cached_property
    def parts(self) -> list[Part]:
        """All parts that are asked for."""
        return parts_of(self.metrics)


class Job:
    """A run that is to be evaluated: its stores, what it lacks, and after its ``passes`` what its parts ask for.

    Stores go by the name of the pass that reads them. It is the ``ScoredRun`` of the metrics' parts.
    """

    def __init__(self, run: Path, settings: Settings) -> None:
        self.folder, self.settings = run, settings
        self._loaded()  # says what is wrong with it before anything is computed
        config = read_cfg(run).get("config")
        config = config if isinstance(config, dict) else {}
        lacking = [name for name in NEEDED if not isinstance(config.get(name), dict)]
        if lacking:
            raise ArtefactError(
                f"{run / 'cfg.json'} does not say how the SAE was trained (it lacks {', '.join(lacking)} of the "
                "config), so its features are not known; leave it out, or train it here."
            )
        self.source, self.on = scored_source(run, config, settings)
        self.out = run / ON / self.on.replace("/", "--").replace(" ", "-") if self.on else run
        if self.on:
            config = config | {"data": dict(self.source.data), "features": self.source.features}
        self.config, self._trained_on = OmegaConf.create(config), read_cfg(run)["features"]
        self.sae_digest = file_sha256(run / "sae.safetensors") + (settings.inference or "")
        self.parts = [p for p in settings.parts if p.is_of(self.config) and not (self.on and "siblings" in p.needs)]
        self.without: dict[str, Exception] = {}  # parts that cannot be had, and why
        self._stores: dict[str, FeatureStore] = {}
        self.release()

    def release(self) -> None:
        """Forget what it holds after its passes."""
        self.passes: dict[str, ScoringPass] = {}
        self.kept: dict[str, Any] = {}  # what all runs of its store share
        self.others: list[Job] = []  # runs that differ by seed
        self._images: dict[tuple[str, str], ImageFeatures] = {}
        self._summary: dict[str, Any] | None = None
        for name in ("sae", "frame", "dictionary"):
            self.__dict__.pop(name, None)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name

    # --- stores -----------------------------------------------------------------------------------
    def store(self, name: str = MAIN) -> FeatureStore:
        """The store that the pass ``name`` reads; extracted if it is missing."""
        if name not in self._stores:
            with self._reading(name) as (source, split):
                found = source.store(split)
            check_store(self.folder, found)
            self._stores[name] = found
        return self._stores[name]

    def load(self) -> SAE:
        """A copy of the SAE; for images or texts, if it was trained on the others, with the train split's statistics.

        As both modalities have a mean and a scale of their own [MSAE §3.3].
        """
        sae = self._loaded()
        if self.source.features != self._trained_on:
            train = self.source.store("train")
            sae.normalizer = Normalizer(train.d_in, train.mean, train.std)
        return sae

    def _loaded(self) -> SAE:
        sae = SAE.load(self.folder)
        if self.settings.inference is not None:
            sae.without_selection()
        return sae

    def fingerprint(self, name: str) -> str:
        """The fingerprint of that store, which need not be there; found once for all runs that read it."""
        with self._reading(name) as (source, split):
            key = _digest([source.data, source.backbone, split, source.features, source.extraction])
            if key not in self.settings.fingerprints:
                self.settings.fingerprints[key] = source.fingerprint(split)
        return self.settings.fingerprints[key]

    @contextmanager
    def _reading(self, name: str) -> Iterator[tuple[Source, str]]:
        """The source and split of the store ``name``; DataError says how to do without a data set that is not there."""
        if name == MAIN:
            yield self.source, self.settings.split
            return
        of, split = name.rsplit("/", 1)
        try:
            yield self._with_data(of), split
        except DataError as error:
            group = next(part.base.split("/")[0] for part in self.settings.parts if part.data == of)
            raise type(error)(
                f"The data set {of} of metrics.{group}: {error} Change metrics.{group}.sets.{of}, or leave it out with "
                f"'~metrics.{group}.sets.{of}'."
            ) from error

    def _with_data(self, name: str) -> Source:
        """The run's source with the data set ``name`` of the metrics' in place of its own."""
        return self.source.replace(data=next(part.options["data"] for part in self.settings.parts if part.data == name))

    # --- what it lacks ----------------------------------------------------------------------------
    def similarity(self, part: Part) -> SimilarityEncoder | None:
        """What says how alike images are for ``part``; None where it does not ask."""
        if part.encoder is not None:
            return SimilarityEncoder(**part.encoder(self.config, part.options))
        return self.settings.similarity if part.name == CORE else None

    def key(self, part: Part) -> str:
        """What the scores of ``part`` depend on, as a digest."""
        stores = [self.fingerprint(name) for name in dict.fromkeys((MAIN, *part.passes, *part.reads))]
        if self.source.features != self._trained_on:
            stores.append(self.source.fingerprint("train"))
        similarity = self.similarity(part)
        judged = [] if similarity is None else [similarity.key(self.source)]
        return _digest([VERSION, part.name, part.keyed, self.sae_digest, stores, *judged])

    def missing(self) -> list[Part]:
        """The parts that have no scores for this SAE, these stores and these settings; not those of siblings.

        Those whose data or encoder cannot be had are no parts of the job from here on, and stand with the reason in
        ``without``; where none is left, the first reason is raised.
        """
        own = self._possible([part for part in self.parts if "siblings" not in part.needs], self.key)
        left = own if self.settings.again else self._missing(own)
        return self._possible(left, self._prepare)

    def _prepare(self, part: Part) -> None:
        """Extract what must be extracted for ``part`` now, not after hours."""
        self._encoder(part)
        for name in (*part.passes, *part.reads):
            self.store(name)

    def _possible(self, parts: list[Part], do: Callable[[Part], object]) -> list[Part]:
        for part in parts:
            try:
                do(part)
            except (DataError, BackboneError, StoreError) as error:
                self.without[part.name] = error
        kept = [part for part in parts if part.name not in self.without]
        if parts and (not kept or CORE in self.without):  # core is what the run's pages are made of
            raise self.without.get(CORE) or next(iter(self.without.values()))
        self.drop(self.without)
        return kept

    def drop(self, parts: Collection[str]) -> None:
        """Do without these parts."""
        self.parts = [part for part in self.parts if part.name not in parts]

    def _missing(self, parts: list[Part]) -> list[Part]:
        split, held = self.settings.split, tensor_names(self.out / LATENTS)
        rewritten = any(p.name == CORE for p in parts) and stored_scores(self.folder, split, [], out=self.out) is None
        left = []
        for part in parts:  # core comes first
            made = scores_of(self.folder, part.base, split, self.key(part), self.on, part.protocol)
            found = made is not None
            if part.name == CORE:
                rewritten = rewritten or not found
            if not found or not held.issuperset(part.leaves) or (rewritten and (part.leaves or part.name == CORE)):
                left.append(part)
        return left

    def open_pass(self, name: str, span: range | None = None, part: str = "whole") -> ScoringPass:
        """The pass ``name`` of this run over the images ``span``, where an earlier process left it.

        It gathers what any part of the run wants of it, finished or not, so that a later call can go on with it.
        """
        store, parts = self.store(name), [part for part in self.parts if name in part.passes]
        similarity = self.settings.similarity
        opened = similarity.open(self.source, self.settings.split) if name == MAIN else None
        judge = ImageEmbeddings(store, opened, similarity.key(self.source)) if name == MAIN else ImageEmbeddings(store)
        metrics: dict[str, SumMetric] = {}
        if name == MAIN:
            sae = self.load()
            metrics |= core_metrics(sae, store, judge) if any("core" in part.needs for part in parts) else {}
            streamed = Streamed(sae, store, judge.d)
            for wanted in parts:
                metrics = {**wanted.streams(streamed, wanted.options), **metrics}
        pools = [pool for pool, need in (("max", "images"), ("mean", "means")) if any(need in p.needs for p in parts)]
        gathered = [*pools, *sorted((part.name, _digest(part.keyed)) for part in parts)]
        digest = _digest([VERSION, GATHERED, gathered, self.sae_digest, store.fingerprint, judge.key])
        folder = self.out / PARTIAL / f"{name.replace('/', '-')}-{self.settings.split}-{digest[:8]}" / part
        device = self.settings.device
        return ScoringPass(
            self.folder, store, judge, folder, metrics, pools, span, device, self.load(), self.out
        )  # fmt: skip

    # --- after its passes: what parts ask for ------------------------------------------------------
    @property
    def device(self) -> str:
        """Where products are computed."""
        return self.settings.device

    @property
    def labelled(self) -> bool:
        """Whether the images have classes."""
        return self.store().labelled

    @cached_property
    def sae(self) -> SAE:
        """The SAE, on the CPU."""
        return self.load()

    @cached_property
    def frame(self) -> Normalizer:
        """Centring and scaling by the statistics of the scored store, in which features are compared and probed.

        Other data sets than the run's own are put into it, too [ViSAEBench Table 2, M6]. It is the store's and not the
        SAE's, so that an SAE with its normaliser folded into the weights has the same scores.
        """
        store = self.store()
        return Normalizer(store.d_in, store.mean, store.std)

    def metric(self, name: str, kind: type[M]) -> M:
        """The sums that a part streams under ``name``."""
        found = self.passes[MAIN].metrics[name]
        assert isinstance(found, kind), f"{name} is a {type(found).__name__}, not a {kind.__name__}"
        return found

    def top(self, n: int) -> TopImages:
        """The ``n`` strongest images of each latent."""
        return self.passes[MAIN].top(n)

    def images(self, name: str = MAIN, pool: str = "max") -> ImageFeatures:
        """What the pass ``name`` gathered of whole images."""
        if (name, pool) not in self._images:
            done = self.passes[name]
            raw, reconstruction = (
                self.frame.normalize(torch.from_numpy(np.array(file.mapped()))).numpy()
                for (_, how), file in done.pools.items() if how == pool
            )  # fmt: skip
            labels, classes = done.store.labels.numpy(), done.store.class_names
            codes = done.codes.matrix() if pool == "max" else self.images(name).codes
            self._images[name, pool] = ImageFeatures(raw, reconstruction, codes, labels, classes)
        return self._images[name, pool]

    def texts(self) -> ImageFeatures | None:
        """The captions of the images, in their order, through the text tower and the SAE; None without captions.

        Both modalities have statistics of their own [MSAE]: captions are moved and scaled so that those of the train
        split have the mean and deviation of its images, which is what the SAE was trained on. ``labels`` tell different
        captions apart.
        """
        source, split = self.source, self.settings.split
        if source.given or source.features == "text":
            return None
        images, captions = source.images(split), source.replace(features="text")
        if not isinstance(images, ImageData) or images.captions is None:
            return None
        store = captions.store(split)
        places, missing = store.find(self.store().image_ids)
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

    def masks(self, name: str) -> tuple[Masks, Masks]:
        """Masks of the train and the test images of the data set ``name``."""

        def make() -> tuple[Masks, Masks]:
            source = self._with_data(name)
            transform = load_backbone(source.backbone).transform
            train, test = (load_masks(source.data, split, transform) for split in ("train", "test"))
            return train, test

        return self.shared(f"masks {name}", make)

    def _encoder(self, part: Part) -> FeatureStore | None:
        """The store of what says how alike images are for ``part``; None when the scored features do."""
        similarity = self.similarity(part)
        return None if similarity is None else similarity.open(self.source, self.settings.split)

    def embeddings(self, part: str) -> Tensor:
        """Embeddings [n, d] float32 of all images by the similarity encoder of a part."""
        store, other = self.store(), self._encoder(next(p for p in self.parts if p.name == part))
        judge, none = ImageEmbeddings(store, other), torch.empty(0)
        spans = (slice(i, min(len(store), i + 1024)) for i in range(0, len(store), 1024))
        return torch.cat([judge.embeddings(span, store.features(span) if other is None else none) for span in spans])

    def batches(self, title: str) -> Iterator[Tensor]:
        """The features [n, P, d_in] of all images, some at a time, with a progress bar."""
        store = self.store()
        return (read for _, read in batches(store, 0, len(store), max(1, 16384 // store.n_patches), title))

    def sibling_groups(self, released: bool = False) -> Groups:
        """Groups of classes that are siblings: those of the data set, or ImageNet's where the classes are its own."""
        if released and (groups := released_groups(self.store().class_names)):
            return groups
        images = None if self.source.given else self.source.images(self.settings.split)
        if isinstance(images, ImageData):
            return images.sibling_groups
        return sibling_groups(self.store().class_names, self.source.data.get("siblings"))

    @cached_property
    def dictionary(self) -> Dictionary:
        """Its decoder and encoder, and which latents are alive on the split."""
        sae = SAE.load(self.folder)
        return Dictionary(sae.W_dec.detach(), sae.W_enc.detach(), read_tensors(self.out / LATENTS)[0]["counts"] > 0)

    def siblings(self) -> list[Dictionary]:
        """Dictionaries of the runs that differ by seed."""
        return [other.dictionary for other in self.others]

    def shared(self, name: str, make: Callable[[], T]) -> T:
        """What ``make`` gives for the store, made once for all of its runs."""
        key = f"{name}|{self.store().fingerprint}"
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def unfinished(self, name: str, options: Options) -> Path:
        """A file for what a part has found so far with its ``options``; it stays until all parts are done."""
        digest = _digest([VERSION, options, self.sae_digest, self.store().fingerprint])
        return self.out / PARTIAL / f"{name.replace(' ', '-')}-{self.settings.split}-{digest[:8]}.json"

    def summary(self, anew: bool = False) -> dict[str, Any]:
        """scores.json and what belongs to single latents, written at the first call; ``anew`` without other parts'."""
        if self._summary is None:
            core = plain(self.settings.metrics.get("core"))
            of_bands = core.get("bands", {})
            options = {"above": core.get("above"), "band_ranks": of_bands.get("ranks"),
                       "band_images": of_bands.get("images")}  # fmt: skip
            given = {name: value for name, value in options.items() if value is not None}
            self._summary = write_summary(self.passes[MAIN], self.settings.latents_shown, **given, anew=anew)
        return self._summary

    def write_latents(self, tensors: Mapping[str, Tensor]) -> None:
        """Add figures [d_sae] to those of the single latents."""
        put_tensors(self.out / LATENTS, dict(tensors))


def scored_source(run: Path, config: Mapping[str, Any], how: Settings) -> tuple[Source, str]:
    """The features that the SAE of ``run`` is scored on, and their data set's name where it is not the run's own.

    Where the SAE is not scored as it was trained the name says so, too.

    ArtefactError where ``features`` are not those that it was trained on, nor the other half of a joint space.
    """
    own = Source.of(config)
    own = own if how.stores is None else own.replace(stores=how.stores)
    kind = how.features or own.features
    if kind != own.features and {kind, own.features} != set(JOINT):
        raise ArtefactError(
            f"{run.name} was trained on {own.features} features, so that it cannot be scored on features={kind}: only "
            "an SAE of embeddings takes texts, and one of texts embeddings. Leave out features."
        )
    other = own.replace(features=kind) if how.data is None else own.replace(features=kind, data=how.data)
    if kind == own.features and _same(own, other, how.split):
        if how.inference is None:
            return own, ""
        other = own
    name = f"{other.data.get('name', other.data['source'])}" + (f" {kind}" if kind != own.features else "")
    return other, name + (f" inference={how.inference}" if how.inference else "")


def _same(own: Source, other: Source, split: str) -> bool:
    if own.data == other.data:
        return True
    try:
        return own.fingerprint(split) == other.fingerprint(split)
    except (DataError, StoreError):  # one is not there: that of the run may be gone, and that of the others is told of
        return False


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
