"""Names from a vocabulary: by the decoder's rows, or by when latents fire."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from sae_lightning.apps.naming.activation import Fits, correlations, fit
from sae_lightning.apps.naming.checks import chance_counts, like
from sae_lightning.apps.naming.match import Match, Score, cosines, match
from sae_lightning.apps.naming.vocabulary import Vocabulary, embed, moments, place, read_words, text_normalizer
from sae_lightning.apps.opened import Opened
from sae_lightning.saes import Normalizer

METHODS = ("decoder", "activation", "labels")
SPACE = ("embedding", "text")  # features whose space texts lie in
RANDOM_WORDS, RANDOM_LATENTS = "random words", "random latents"


@dataclass(frozen=True)
class TextNames:
    """What matching latents with a vocabulary gave.

    ``match`` is over ``latents`` [n] (indices) and ``words`` [V]; ``other`` is the match with b_pre treated the other
    way (of the decoder alone). ``chance`` holds the counts of random words and random latents. ``texts`` [V, d] is
    where the words lie among images' embeddings.
    """

    method: str
    measure: str
    threshold: float
    words: list[str]
    same: int
    centre: str
    latents: np.ndarray
    match: Match
    other: Match | None
    chance: dict[str, dict[str, dict[str, float]]]
    texts: Tensor


def chosen_method(opened: Opened, wanted: str) -> str:
    """``wanted``, or for ``auto`` the first of ``METHODS`` that the run allows.

    ValueError for an unknown one, and for one that the run's features or encoder do not allow.
    """
    if wanted not in ("auto", *METHODS):
        raise ValueError(f"Unknown app.method={wanted}; choose one of auto, {', '.join(METHODS)}.")
    if wanted == "labels":
        return wanted
    features, kinds = opened.made["features"], opened.backbone.kinds
    can = {
        "decoder": features in SPACE and "text" in kinds,
        "activation": "text" in kinds and "embedding" in kinds,
        "labels": True,
    }
    if wanted == "auto":
        return next(method for method in METHODS if can[method])
    if not can[wanted] and "text" not in kinds:
        raise ValueError(
            f"app.method={wanted} needs an encoder with a text tower, and {opened.backbone.title} has none; train on "
            "clip or siglip, or set app.method=labels."
        )
    if not can[wanted]:
        raise ValueError(
            f"app.method={wanted} compares the decoder with texts, but {opened.name} was trained on {features} "
            "features, whose space has no texts; train with features=embedding, or set app.method=activation."
        )
    return wanted


def name_by_text(opened: Opened, method: str, latents: np.ndarray, cfg: DictConfig) -> TextNames:
    """Match ``latents`` [n] with the vocabulary that ``cfg.app`` describes, and random ones with the same thresholds.

    ValueError for options that are none or cannot be met.
    """
    options = cfg.app
    if options.b_pre not in ("keep", "remove"):
        raise ValueError(f"Unknown app.b_pre={options.b_pre}; choose keep (the paper's choice) or remove.")
    vocabulary = _vocabulary(opened, options)
    found = _by_decoder if method == "decoder" else _by_activation
    return found(opened, latents, vocabulary, cfg)


def image_embeddings(opened: Opened, split: str) -> Tensor:
    """Embeddings [n, d] float32 of the images of ``split``, in their order; extracted if missing."""
    if opened.made["features"] == "embedding":
        return torch.from_numpy(opened.features(split))
    return opened.store(split, "embedding").features(slice(None))[:, 0].float()


def _vocabulary(opened: Opened, options: DictConfig) -> Vocabulary:
    wanted = options.vocabulary
    if wanted == "auto":
        wanted = "demo" if opened.config.backbone.size == "tiny" else "imagenet22k"
    words = read_words(wanted, opened.images("train").class_names)
    found = embed(words, list(options.templates), opened.backbone)
    if len(found.words) < 2:
        raise ValueError(
            f"The text tower of {opened.backbone.title} takes all {len(words)} words of app.vocabulary={wanted} for "
            "one and the same; choose words that it knows."
        )
    return found


def _by_decoder(opened: Opened, latents: np.ndarray, vocabulary: Vocabulary, cfg: DictConfig) -> TextNames:
    """Cosines of decoder rows and texts [MSAE App. A]."""
    options, sae = cfg.app, opened.sae
    normalizer, centre = text_normalizer(opened, vocabulary.embeddings, options.centre, sae.normalizer)
    keep = options.b_pre == "keep"
    texts, texts_other = (place(vocabulary.embeddings, normalizer, sae, b_pre) for b_pre in (keep, not keep))
    rows = sae.W_dec.detach()[torch.from_numpy(latents)]
    train = sae.normalizer.normalize(torch.from_numpy(opened.features("train")))
    limits = (options.baseline.draws, options.thresholds.cosine, options.thresholds.ratio, cfg.seed)

    def matched(directions: Tensor, words: Tensor) -> Match:
        return match(cosines(directions, words), len(directions), len(words))

    chance = {
        RANDOM_WORDS: chance_counts(lambda g: matched(rows, like(texts, len(texts), g)), *limits),
        RANDOM_LATENTS: chance_counts(lambda g: matched(like(train, len(rows), g), texts), *limits),
    }
    return TextNames(
        "decoder", "cosine", options.thresholds.cosine, vocabulary.words, vocabulary.same, centre, latents,
        matched(rows, texts), matched(rows, texts_other), chance, texts if keep else texts_other,
    )  # fmt: skip


def _by_activation(opened: Opened, latents: np.ndarray, vocabulary: Vocabulary, cfg: DictConfig) -> TextNames:
    """Correlations over the train images of pooled codes and how well each word fits each image."""
    options = cfg.app
    images = image_embeddings(opened, "train")
    own = Normalizer(images.shape[1], *moments(images))
    normalizer, centre = text_normalizer(opened, vocabulary.embeddings, options.centre, own)
    texts = normalizer.normalize(vocabulary.embeddings)
    texts = texts / texts.norm(dim=1, keepdim=True).clamp_min(1e-12)
    fits = fit(images, texts)
    codes = opened.codes("train").tocsc()[:, latents]
    limits = (options.baseline.draws, options.thresholds.correlation, options.thresholds.ratio, cfg.seed)

    def matched(score: Score) -> Match:
        return match(score, len(latents), len(texts))

    def other_words(generator: torch.Generator) -> Match:
        return matched(correlations(codes, fit(images, like(texts, len(texts), generator))))

    def other_images(generator: torch.Generator) -> Match:
        order = torch.randperm(len(fits.images), generator=generator)
        return matched(correlations(codes, Fits(fits.images[order], fits.texts)))

    chance = {
        RANDOM_WORDS: chance_counts(other_words, *limits), RANDOM_LATENTS: chance_counts(other_images, *limits),
    }  # fmt: skip
    return TextNames(
        "activation", "correlation", options.thresholds.correlation, vocabulary.words, vocabulary.same, centre,
        latents, matched(correlations(codes, fits)), None, chance, texts,
    )  # fmt: skip
