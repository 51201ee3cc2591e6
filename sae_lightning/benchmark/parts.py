"""All parts of the benchmark, in the order of their computation, as the config group ``metrics`` asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from omegaconf import DictConfig

from sae_lightning.benchmark import part_scores as scores
from sae_lightning.benchmark.part import Part, on_patches, plain
from sae_lightning.benchmark.scoring_pass import Gather
from sae_lightning.benchmark.similarity import Similarity

SECTIONS = (
    "core", "moran", "raw_moran", "histograms", "monosemanticity", "preservation", "sparse_probing", "absorption",
    "cknna", "retrieval", "image_text", "recovery", "cross_domain", "segmentation", "stability",
)  # fmt: skip

UNDEFINED = {
    "preservation": "the probe of the raw features is never right on the images held out",
    "sparse_probing": "the images held out are of one class",
    "absorption": "no group of sibling classes has {min_group} of them among the images that probes see",
    "cknna": "no image has neighbours to compare",
    "retrieval": "no two images are of one class, or raw features never find one",
}


def parts_of(metrics: DictConfig) -> list[Part]:
    """The parts that ``metrics`` names; ValueError for one that is unknown."""
    unknown = [str(name) for name in metrics if name not in SECTIONS]
    if unknown:
        raise ValueError(f"Unknown metrics.{unknown[0]}; the parts are {', '.join(SECTIONS)}.")
    parts: list[Part] = []
    for name in SECTIONS:
        node = metrics.get(name)
        if node is not None and node is not False and name in MAKERS:
            parts += MAKERS[name]({} if node is True else plain(node))
    return parts


def _core(options: dict[str, Any]) -> list[Part]:
    undefined = "no latent fires on enough images, or the features do not vary"
    return [Part("core", scores.core, options, wants=Gather(), undefined=undefined)]


def _moran(options: dict[str, Any]) -> list[Part]:
    wants = Gather(moran=options)  # core, too: what is written of single latents is written at once
    undefined = (
        f"no latent has {options['min_images']} images with {options['min_active']} active patches and some variance"
    )
    return [
        Part("moran", scores.moran, options, wants=wants, applies=on_patches, leaves=("moran",), undefined=undefined)
    ]


def _raw_moran(options: dict[str, Any]) -> list[Part]:
    undefined = f"no channel varies on {options['min_images']} images"
    return [Part("raw_moran", scores.raw_moran, options, passes=(), applies=on_patches, undefined=undefined)]


def _histograms(options: dict[str, Any]) -> list[Part]:
    wants, undefined = Gather(core=False, histograms=options), "no latent is active"
    return [Part("histograms", scores.histograms, options, wants=wants, undefined=undefined)]


def _monosemanticity(options: dict[str, Any]) -> list[Part]:
    judges, pairing = options.pop("judges"), options.pop("pairing")
    other, features, store = options.pop("other"), options.pop("features"), options.pop("store")

    def judge(config: DictConfig) -> Similarity:
        if store is not None:
            return Similarity(store=store)
        name = pairing.get(config.backbone.name, other)
        if name not in judges:
            raise ValueError(
                f"metrics.monosemanticity names {name} as the judge of {config.backbone.name}, but not that encoder; "
                f"add +backbone@metrics.monosemanticity.judges.{name}={name}."
            )
        chosen = judges[name]
        return Similarity(chosen and {**chosen, "size": config.backbone.size}, features)

    wants = Gather(top=options["images"])
    leaves = ("monosemanticity",)
    return [
        Part(
            "monosemanticity", scores.monosemanticity, options, wants=wants, leaves=leaves, judge=judge,
            undefined="no latent has two images to compare, or the images have no classes",
        )
    ]  # fmt: skip


def _of_images(name: str, options: dict[str, Any]) -> list[Part]:
    """A part computed from the features of whole images."""
    return [Part(name, getattr(scores, name), options, undefined=UNDEFINED[name].format(**options))]


def _image_text(options: dict[str, Any]) -> list[Part]:
    return [Part("image_text", scores.image_text, options, applies=lambda config: config.features == "embedding")]


def _recovery(options: dict[str, Any]) -> list[Part]:
    return [Part("recovery", scores.recovery, options, passes=())]


def _cross_domain(options: dict[str, Any]) -> list[Part]:
    sets = options.pop("sets", {})
    return [
        Part(
            f"cross_domain/{name}", partial(scores.cross_domain, name), options | {"data": data},
            passes=(f"{name}/train", f"{name}/test"), applies=_of_size(data),
            undefined="the probe of the raw features is never right, or the test images are of one class",
        )
        for name, data in sets.items()
    ]  # fmt: skip


def _segmentation(options: dict[str, Any]) -> list[Part]:
    sets = options.pop("sets", {})
    return [
        Part(
            f"segmentation/{name}", partial(scores.segmentation, name), options | {"data": data}, passes=(),
            reads=(f"{name}/train", f"{name}/test"), applies=_of_size(data, patches=True),
            undefined="the probe of the raw features is never right, or no test pixel has a class",
        )
        for name, data in sets.items()
    ]  # fmt: skip


def _of_size(data: Mapping[str, Any], patches: bool = False) -> Callable[[DictConfig], bool]:
    """Runs on backbones of the size that the data set is for, with ``patches`` those on patch tokens."""
    return lambda config: config.backbone.size == data["backbones"] and (on_patches(config) or not patches)


MAKERS: dict[str, Callable[[dict[str, Any]], list[Part]]] = {
    "core": _core, "moran": _moran, "raw_moran": _raw_moran, "histograms": _histograms,
    "monosemanticity": _monosemanticity, "image_text": _image_text, "recovery": _recovery,
    "cross_domain": _cross_domain, "segmentation": _segmentation,
    **{name: partial(_of_images, name) for name in (
        "preservation", "sparse_probing", "absorption", "cknna", "retrieval"
    )},
}  # fmt: skip
