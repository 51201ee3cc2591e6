"""An encoder with what reads classes off its output, and the pictures that it is shown: for metrics that run it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import optimize
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from sae_lightning.backbones.backbone import Backbone
from sae_lightning.backbones.registry import load_backbone
from sae_lightning.backbones.taps import Layout, tensor_of
from sae_lightning.data import ImageData
from sae_lightning.features.prepare import Pictures, collate
from sae_lightning.features.store import FeatureStore
from sae_lightning.metrics import probes
from sae_lightning.metrics.part import Options, ScoredRun
from sae_lightning.saes.codes import SparseCodes
from sae_lightning.saes.sae import SAE

BEHIND = ("patch", "cls")  # kinds of features behind which the encoder goes on

TOKENS = 1 << 14  # of a store, encoded at once


class Unknown(Exception):  # noqa: N818 - no error: it says why there are no figures
    """Why nothing can be said."""


class Readout(NamedTuple):
    """Logits of an encoder's outputs [n, d], of unit length where ``unit``: output · weight [d, C] + bias [C]."""

    weight: Tensor
    bias: Tensor
    unit: bool = False

    def logits(self, outputs: Tensor) -> Tensor:
        """[n, C] float64, on the CPU."""
        x = outputs.double().cpu()
        return (normalize(x, dim=1) if self.unit else x) @ self.weight + self.bias


def readout(outputs: Tensor, labels: np.ndarray, options: Options, texts: Tensor | None = None) -> Readout:
    """Logistic regression on ``outputs`` [n, d], each dimension centred and scaled; or where there are ``texts`` [C, d]
    of the classes cosines with these, at the temperature that suits the ``labels`` best."""
    x = outputs.double().cpu()
    if texts is not None:
        unit = Readout(normalize(texts.double().cpu(), dim=1).T, torch.zeros(len(texts)).double(), unit=True)
        cosines, rows = unit.logits(x).numpy(), np.arange(len(labels))

        def loss(log_scale: float) -> float:
            return float(-probes.log_probabilities(np.exp(log_scale) * cosines)[rows, labels].mean())

        best = optimize.minimize_scalar(loss, bounds=(-2.0, 7.0), method="bounded").x
        return unit._replace(weight=np.exp(best) * unit.weight)
    mean, std = x.mean(0), x.std(0, correction=0).clamp_min(1e-6)
    model = probes.fit(((x - mean) / std).numpy(), labels, **probes.solver(options))
    weight, bias = (torch.from_numpy(np.atleast_1d(each)).double() for each in (model.coef_.T, model.intercept_))
    if weight.shape[1] == 1:  # of the second of two classes
        weight, bias = torch.cat([0 * weight, weight], 1), torch.cat([0 * bias, bias])
    return Readout(weight / std[:, None], bias - (mean / std) @ weight)


def spans(n: int, step: int) -> list[range]:
    """0 … n - 1 in pieces of up to ``step``."""
    return [range(i, min(i + step, n)) for i in range(0, n, step)]


class Sample(NamedTuple):
    """Pictures of a split, as the encoder takes them: their ``rows`` in its ``store``, their classes [n] int64."""

    pictures: Pictures
    store: FeatureStore
    rows: np.ndarray
    labels: np.ndarray

    def pixels(self, span: range, device: str | torch.device) -> Tensor:
        """[n, 3, H, W]; DataError for a picture that cannot be read."""
        found, errors, _ = collate([self.pictures[i] for i in span])
        for error in errors.values():
            raise error
        assert found is not None
        return found.to(device)

    def codes(self, sae: SAE) -> Iterator[tuple[range, SparseCodes]]:
        """Those of the tokens of some pictures at a time."""
        for span in spans(len(self.rows), max(1, TOKENS // self.store.n_patches)):
            yield span, sae.encode(self.store.features(self.rows[span.start : span.stop]).to(sae.W_dec.device).float())


def drawn(
    images: ImageData, store: FeatureStore, classes: Sequence[str], n: int, backbone: Backbone, seed: int
) -> Sample:
    """``n`` pictures of the ``classes``, drawn by ``seed`` among those that are in the ``store``."""
    numbers, there = {name: i for i, name in enumerate(classes)}, set(store.image_ids)
    labels = np.array([numbers.get(name, -1) for name in images.class_names])[images.labels]
    fits = [i for i in np.flatnonzero(labels >= 0) if images.image_ids[i] in there]
    chosen = np.sort(np.random.default_rng(seed).permutation(fits)[:n])
    taken = images.take(chosen)
    return Sample(Pictures(taken, backbone), store, store.find(taken.image_ids)[0], labels[chosen])


class Study(NamedTuple):
    """An encoder with what reads classes off its output (with ``patches`` that of ``outputs``), and the pictures."""

    backbone: Backbone
    train: Sample
    test: Sample
    readout: Readout
    patches: bool


def outputs(
    backbone: Backbone, images: Tensor, patches: bool, watch: Callable[[int, Tensor], object] = lambda *_: None
) -> Tensor:
    """The embedding or pooled output [n, d] of ``images``; with ``patches``, or where the encoder has neither, the mean
    of its last layer's patch tokens. ``watch`` sees what each layer gives on the way."""
    last, (rows, columns) = backbone.depth - 1, backbone.grid_at(-1)
    means: list[Tensor] = []

    def hook(module: nn.Module, args: Any, given: Any, layer: int) -> None:
        watch(layer, tensor_of(given))
        if layer == last:
            layout = Layout(backbone.width_at(last), None, rows * columns)
            means.append(layout.split(tensor_of(given))[1].mean(1))

    handles = []
    try:
        for layer in range(backbone.depth):
            handles.append(backbone.module_at(layer).register_forward_hook(partial(hook, layer=layer)))
        output = backbone.output(images)
    finally:
        for handle in handles:
            handle.remove()
    return means[0] if patches or output is None else output


def study(run: ScoredRun, options: Options) -> Study:
    """That of a run; Unknown where its pictures are not there, or where no encoder lies behind its features."""
    source, split, seed = run.source, run.store().split, options["seed"]
    if source.given:
        raise Unknown("the features' pictures are not known, and the encoder must see them again")
    if source.features not in BEHIND:
        raise Unknown(f"nothing of the encoder lies behind {source.features} features, as it does behind patch and cls")
    if source.site != "block":
        raise Unknown(f"features at site={source.site} lie beside what the encoder hands on; site=block is scored")
    images, train_images = source.images(split), source.images("train")
    if not (isinstance(images, ImageData) and isinstance(train_images, ImageData)):
        raise Unknown("a stream of pictures cannot be read at will; set data.streaming=false")
    backbone = load_backbone(source.backbone).to(run.device)
    if options["readout"] == "zero_shot" and not {"text", "embedding"} <= set(backbone.kinds):
        raise Unknown(f"{backbone.title} has no text tower; set metrics.causal.readout=probe")
    both = set.intersection(*({i.class_names[c] for c in np.unique(i.labels)} for i in (images, train_images)))
    classes = [name for name in images.class_names if name in both]
    if len(classes) < 2:
        raise Unknown(f"fewer than two classes have pictures of both the train and the {split} split")
    kept = np.random.default_rng(seed).permutation(len(classes))[: options["classes"]]
    classes = [classes[i] for i in np.sort(kept)]
    train = drawn(train_images, source.store("train"), classes, options["train"], backbone, seed)
    test = drawn(images, run.store(), classes, options["images"], backbone, seed)
    patches, texts = options["output"] == "patch", None
    bar = tqdm(spans(len(train.rows), options["rows"]), f"{backbone.title}, train pictures", unit="batch", leave=False)
    found = torch.cat([outputs(backbone, train.pixels(span, run.device), patches).cpu() for span in bar])
    if options["readout"] == "zero_shot":
        texts = backbone.encode_text([options["template"].format(name.replace("_", " ")) for name in classes])
    return Study(backbone, train, test, readout(found, train.labels, options, texts), patches)
