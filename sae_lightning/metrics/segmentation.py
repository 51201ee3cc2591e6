"""How well classes of patches are read off raw features, reconstructions and codes: linear segmentation probes.

ViSAEBench's segmentation task (H1, Appendix O); its probes are those of Appendix L for GPUs. Everything streams: no
features, codes or masks of more than a batch of images are held, only the class of each patch of the train images and
the pixels of each class in each patch of the test images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from sae_lightning.data.masks import IGNORE, Masks
from sae_lightning.features.manifest import StoreError
from sae_lightning.features.store import FeatureStore
from sae_lightning.metrics.base import Score
from sae_lightning.metrics.part import Column, Options, Part, ScoredRun, Task, on_patches, register
from sae_lightning.registry import one_of
from sae_lightning.saes import SAE, SparseCodes
from sae_lightning.saes.sae import Normalizer

RAW, RECONSTRUCTION, CODES = "raw", "reconstruction", "codes"

RESOLUTIONS = ("pixel", "patch")

Inputs = Mapping[str, Tensor | SparseCodes]  # by name, of N tokens each

Heads = dict[str, tuple[Tensor, Tensor]]  # by name of the input, weights [width, classes] and bias [classes]


@dataclass(frozen=True)
class Probing:
    """How the probes are trained and scored; rate, weight decay and batch are those of Appendix L.

    ``lr`` falls linearly to zero unless ``decay`` is off: at a constant rate batches of whole images, whose tokens are
    alike, leave the probes short of their optimum. ``resolution`` is that of the score: every labelled ``pixel`` with
    the class of its patch, or every ``patch`` with its majority class. ValueError for an unknown one and for numbers
    below 1.
    """

    epochs: int = 10
    lr: float = 1e-2
    decay: bool = True
    weight_decay: float = 1e-4
    batch_tokens: int = 2048
    seed: int = 42
    resolution: str = "pixel"

    def __post_init__(self) -> None:
        one_of(self.resolution, RESOLUTIONS, "resolution")
        if min(self.epochs, self.batch_tokens) < 1:
            raise ValueError(f"epochs={self.epochs} and batch_tokens={self.batch_tokens} must be at least 1.")


class Segmented(NamedTuple):
    """Mean intersection over union of the classes in the test masks, and the share of labelled pixels got right."""

    miou: float
    accuracy: float


class Sets(NamedTuple):
    """Patch features and masks of the images to train on and of those to score."""

    train: FeatureStore
    test: FeatureStore
    train_masks: Masks
    test_masks: Masks


def segmentation(
    sae: SAE, sets: Sets, probing: Probing | None = None, raw: Segmented | None = None, name: str | None = None,
    frame: Normalizer | None = None,
) -> list[Score]:  # fmt: skip
    """``segmentation_miou`` and ``segmentation_accuracy`` with ``data=<name>,input=raw|reconstruction|codes``, and
    ``segmentation_lift`` = mIoU of codes / mIoU of raw [ViSAEBench Table 8], NaN where the latter is 0.

    Probes see raw features and reconstructions in ``frame``, by default that of the train store's statistics. ``raw``
    is what ``segment_raw`` gave in it, else its probe is trained along; ``name`` is by default that of the test store's
    data. The SAE is set to evaluation. StoreError when the stores are not of patch tokens, DataError when an image has
    no mask, ValueError when the train masks have no labelled pixel, or the two sets have other classes.
    """
    device = sae.W_dec.device
    frame = frame or Normalizer(sets.train.d_in, sets.train.mean, sets.train.std).to(device)
    inputs = (RECONSTRUCTION, CODES) if raw is not None else (RAW, RECONSTRUCTION, CODES)
    sae.eval()
    widths = {given: sae.d_sae if given == CODES else sae.d_in for given in inputs}
    found = _segment(lambda x: sae_inputs(sae, frame, x, inputs), widths, sets, probing or Probing(), device)
    if raw is not None:
        found[RAW] = raw
    about = f"data={sets.test.data if name is None else name}"
    scores = [
        Score(f"segmentation_{metric}", getattr(found[given], metric), f"{about},input={given}")
        for given in (RAW, RECONSTRUCTION, CODES)
        for metric in Segmented._fields
    ]
    lift = found[CODES].miou / found[RAW].miou if found[RAW].miou else float("nan")
    return [*scores, Score("segmentation_lift", lift, about)]


def segment_raw(frame: Normalizer, sets: Sets, probing: Probing | None = None) -> Segmented:
    """The scores of raw features in ``frame``, the same for all SAEs; on the device that it is on."""
    widths = {RAW: sets.train.d_in}
    device = frame.mean.device
    return _segment(lambda x: {RAW: frame.normalize(x)}, widths, sets, probing or Probing(), device)[RAW]


@torch.no_grad()
def sae_inputs(
    sae: SAE, frame: Normalizer, features: Tensor, names: tuple[str, ...]
) -> dict[str, Tensor | SparseCodes]:
    """What the probes of these ``names`` see of raw ``features`` [N, d_in]: codes, or features in ``frame``."""
    codes = sae.encode(features)
    made: dict[str, Callable[[], Tensor | SparseCodes]] = {
        RAW: lambda: frame.normalize(features),
        RECONSTRUCTION: lambda: frame.normalize(sae.decode(codes)),
        CODES: lambda: codes,
    }
    return {name: made[name]() for name in names}


def mean_iou(confusion: np.ndarray) -> Segmented:
    """Scores of a ``confusion`` [classes, classes] int64: pixels by true class (rows) and predicted class.

    NaN without a pixel. A class that is predicted but not there costs the others what it takes from them.
    """
    hits, there = np.diag(confusion), confusion.sum(1)
    present = there > 0
    if not present.any():
        return Segmented(float("nan"), float("nan"))
    union = there + confusion.sum(0) - hits
    return Segmented(float((hits[present] / union[present]).mean()), float(hits.sum() / there.sum()))


def _segment(
    inputs_of: Callable[[Tensor], Inputs], widths: Mapping[str, int], sets: Sets, probing: Probing,
    device: torch.device,
) -> dict[str, Segmented]:  # fmt: skip
    """Train one head an input, all on the same batches, and score them."""
    grid = _checked(sets)
    n_classes = len(sets.train_masks.class_names)
    labels = torch.from_numpy(sets.train_masks.of(sets.train.image_ids).patch_labels(grid))
    if not (labels != IGNORE).any():
        raise ValueError(f"The train masks of '{sets.train_masks.name}' have no labelled pixel.")
    heads = _heads(widths, n_classes, device)
    _train(heads, inputs_of, sets.train, labels, probing, device)
    masks = sets.test_masks.of(sets.test.image_ids)
    pixels = masks.patch_pixels(grid)
    if probing.resolution == "patch":
        truth = masks.patch_labels(grid).ravel()
        patch = np.flatnonzero(truth != IGNORE)
        label, count = truth[patch].astype(np.int64), np.ones(len(patch), dtype=np.int64)
    else:
        patch, label, count = pixels
    found = {}
    for name, predicted in _predict(heads, inputs_of, sets.test, probing, device).items():
        confusion = np.zeros((n_classes, n_classes), dtype=np.int64)
        np.add.at(confusion, (label, predicted[patch]), count)
        found[name] = mean_iou(confusion)
    return found


def _checked(sets: Sets) -> tuple[int, int]:
    """The grid of the stores, which must hold patch tokens; the masks must have the same classes."""
    for store in (sets.train, sets.test):
        if not store.spatial:
            raise StoreError(f"{store.folder} holds {store.kind} features; segmentation needs patch tokens.")
    if sets.train.grid != sets.test.grid:
        raise StoreError(
            f"{sets.train.folder} has {sets.train.grid} patches and {sets.test.folder} {sets.test.grid}; extract both "
            "with the same backbone."
        )
    if sets.train_masks.class_names != sets.test_masks.class_names:
        raise ValueError("The train and test masks have different classes; load both with the same data config.")
    rows, columns = sets.train.grid
    return rows, columns


def _heads(widths: Mapping[str, int], n_classes: int, device: torch.device) -> Heads:
    """Heads that start at zero."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, device=device, requires_grad=True)

    return {name: (zeros(width, n_classes), zeros(n_classes)) for name, width in widths.items()}


def _train(
    heads: Heads, inputs_of: Callable[[Tensor], Inputs], store: FeatureStore, labels: Tensor, probing: Probing,
    device: torch.device,
) -> None:  # fmt: skip
    """Adam on the cross-entropy of each head on the labelled patches; ``labels`` [n, P] uint8."""
    parameters = [parameter for head in heads.values() for parameter in head]
    optimizer = torch.optim.Adam(parameters, lr=probing.lr, weight_decay=probing.weight_decay)
    useful = torch.nonzero((labels != IGNORE).any(1))[:, 0].numpy()
    steps = probing.epochs * len(list(_batches(useful, store, probing)))
    rate = LambdaLR(optimizer, lambda step: 1 - step / steps if probing.decay else 1.0)
    for epoch in tqdm(range(probing.epochs), "Segmentation probes", unit="epoch", leave=False):
        order = np.random.default_rng([probing.seed, epoch]).permutation(useful)
        for images in _batches(order, store, probing):
            target = labels[torch.from_numpy(images)].flatten().long()
            kept = target != IGNORE
            inputs = inputs_of(store.features(images)[:, store.prefix :].flatten(0, 1)[kept].to(device))
            target = target[kept].to(device)
            losses = [cross_entropy(_logits(given, heads[name]), target) for name, given in inputs.items()]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
            rate.step()


@torch.no_grad()
def _predict(
    heads: Heads, inputs_of: Callable[[Tensor], Inputs], store: FeatureStore, probing: Probing, device: torch.device
) -> dict[str, np.ndarray]:
    """The most likely class of every patch of every image, [n · P] uint8, by input."""
    predicted: dict[str, list[np.ndarray]] = {name: [] for name in heads}
    for images in _batches(np.arange(len(store)), store, probing):
        inputs = inputs_of(store.features(images)[:, store.prefix :].flatten(0, 1).to(device))
        for name, given in inputs.items():
            predicted[name].append(_logits(given, heads[name]).argmax(1).to("cpu", torch.uint8).numpy())
    return {name: np.concatenate(parts) for name, parts in predicted.items()}


def _batches(order: np.ndarray, store: FeatureStore, probing: Probing) -> Iterator[np.ndarray]:
    """Whole images, as many as have ``batch_tokens`` tokens, at least one."""
    size = max(1, probing.batch_tokens // store.n_patches)
    yield from (order[start : start + size] for start in range(0, len(order), size))


def _logits(given: Tensor | SparseCodes, head: tuple[Tensor, Tensor]) -> Tensor:
    """[N, classes]; of codes without making them dense."""
    weights, bias = head
    return given.decode(weights, bias) if isinstance(given, SparseCodes) else torch.addmm(bias, given, weights)


def scores(run: ScoredRun, options: Options) -> list[Score]:
    """mIoU of linear probes of patch tokens on one data set."""
    name = options["name"]
    sets = Sets(run.store(f"{name}/train"), run.store(f"{name}/test"), *run.masks(name))
    probing = Probing(**{k: v for k, v in options.items() if k not in ("data", "name")})
    raw = run.shared(f"segmentation {name} {probing}", lambda: segment_raw(run.frame, sets, probing))
    return segmentation(run.sae, sets, probing, raw, name, run.frame)


OVER = "segmentation of {data}, mIoU"
PART = register(Part(
    "segmentation", scores, needs=("sets",), applies=on_patches, title="Downstream tasks",
    undefined="the probe of the raw features is never right, or no test pixel has a class",
    columns=(
        *(Column(given, "segmentation_miou", f"data={{data}},input={given}", form=".1%", over=OVER)
          for given in (RAW, RECONSTRUCTION, CODES)),
        Column("codes / raw", "segmentation_lift", "data={data}", better=True, over=OVER),
    ),
    tasks=(Task("segmentation:{data}/{input}", "segmentation_miou", "data={data},input={input}"),),
))  # fmt: skip
