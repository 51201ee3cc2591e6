"""The words that latents may be called by, and where they lie in the space that an SAE was trained in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from timm.data import ImageNetInfo
from torch import Tensor

from sae_lightning.apps.naming.match import Fits, Match, Score, chance_counts, correlations, cosines, fit, like, match
from sae_lightning.backbones.backbone import Backbone
from sae_lightning.registry import one_of
from sae_lightning.runs.run import Run
from sae_lightning.saes import SAE, Normalizer
from sae_lightning.saes.sae import input_norm

SHIPPED = Path(__file__).resolve().parents[2] / "assets" / "vocabulary"

IMAGENET = {"imagenet1k": "imagenet-1k", "imagenet22k": "imagenet-22k"}  # first names of WordNet synsets, from timm

CENTRES = ("auto", "captions", "vocabulary", "images")

BATCH = 256  # texts encoded at once

SAME = 1 - 1e-6  # cosine from which two texts are one to the text tower


@dataclass(frozen=True)
class Vocabulary:
    """``words`` and their raw embeddings [V, d] float32; ``same`` counts words left out for having another's."""

    words: list[str]
    embeddings: Tensor
    same: int = 0


def read_words(wanted: str | Sequence[str], classes: Sequence[str] = ()) -> list[str]:
    """The words of one or several lists, each once, in their order.

    A list is ``classes`` (those of the data set), ``imagenet1k`` or ``imagenet22k``, a shipped one (``demo``,
    ``demo_phrases``), or a UTF-8 text file with one word or phrase a line; empty lines and those that begin with # are
    passed over. ValueError when a list is unknown or unreadable, or all together give fewer than two words.
    """
    lists = [wanted] if isinstance(wanted, str) else list(wanted)
    words = list(dict.fromkeys(word for one in lists for word in _words_of(str(one), classes)))
    if len(words) < 2:
        raise ValueError(
            f"app.vocabulary={wanted} gives {len(words)} words; naming needs at least two to tell them apart."
        )
    return words


def _words_of(wanted: str, classes: Sequence[str]) -> list[str]:
    if wanted == "classes":
        return [name.replace("_", " ") for name in classes]
    if wanted in IMAGENET:
        synsets = ImageNetInfo(IMAGENET[wanted]).label_descriptions()
        return [words.partition(", ")[0] for words in synsets]
    shipped = SHIPPED / f"{wanted}.txt"
    path = shipped if shipped.is_file() else Path(wanted).expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"app.vocabulary={wanted} is not UTF-8 text (byte {error.start}); save it as UTF-8, one word a line."
        ) from error
    except OSError as error:
        known = ", ".join(["classes", *IMAGENET, *sorted(file.stem for file in SHIPPED.glob("*.txt"))])
        raise ValueError(
            f"app.vocabulary={wanted} cannot be read ({error.strerror}); give a text file with one word a line, or "
            f"one of {known}."
        ) from error
    stripped = (line.strip() for line in lines)
    return [line for line in stripped if line and not line.startswith("#")]


def fill(template: str, word: str) -> str:
    """``template`` with ``{}`` replaced by the word, or ``{a}`` by the word after its article."""
    article = "an" if word[:1].lower() in "aeiou" else "a"
    return template.replace("{a}", f"{article} {word}").replace("{}", word)


def embed(words: Sequence[str], templates: Sequence[str], backbone: Backbone) -> Vocabulary:
    """The words through the text tower; of several templates the mean of their unit embeddings, at their mean norm.

    Words that the tower cannot tell from an earlier one (a small tower knows few) are left out and counted.
    ValueError for a template without a place for the word; BackboneError without a text tower.
    """
    wrong = next((t for t in templates if "{}" not in t and "{a}" not in t), None if templates else "")
    if wrong is not None:
        raise ValueError(
            f"app.templates has '{wrong}', without a place for the word; write for example 'a photo of {{}}' or "
            "'a photo of {a}', where the word gets its article."
        )
    unit, norm = torch.zeros(()), torch.zeros(())
    for template in templates:
        texts = [fill(template, word) for word in words]
        parts = [backbone.encode_text(texts[i : i + BATCH]).float().cpu() for i in range(0, len(texts), BATCH)]
        one = torch.cat(parts)
        unit = unit + one / one.norm(dim=1, keepdim=True)
        norm = norm + one.norm(dim=1, keepdim=True)
    unit = unit / unit.norm(dim=1, keepdim=True)
    kept = _first_of_same(unit)
    embeddings = (unit * norm / len(templates))[kept]
    return Vocabulary([words[i] for i in kept.tolist()], embeddings, len(words) - len(kept))


def _first_of_same(unit: Tensor) -> Tensor:
    """Indices of those rows of ``unit`` [V, d] that are as good as equal to no earlier one."""
    kept = torch.ones(len(unit), dtype=torch.bool)
    for start in range(0, len(unit), BATCH):
        near = unit[start : start + BATCH] @ unit.T > SAME
        earlier = torch.arange(len(unit)) < torch.arange(start, start + len(near))[:, None]
        kept[start : start + BATCH] = ~(near & earlier).any(1)
    return kept.nonzero().ravel()


def place(embeddings: Tensor, normalizer: Normalizer, sae: SAE, b_pre: bool = True) -> Tensor:
    """Raw text embeddings [V, d_in] where the decoder's rows lie, as unit vectors [MSAE App. A].

    They go through what the SAE does to its inputs, with the ``normalizer`` of texts in place of that of images;
    with ``b_pre`` false, b_pre is taken away too.
    """
    x = input_norm(sae.input_norm, normalizer.normalize(embeddings))[0]
    x = x if b_pre else x - sae.b_pre.detach()
    return x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)


def text_normalizer(opened: Run, embeddings: Tensor, centre: str, own: Normalizer) -> tuple[Normalizer, str]:
    """How texts are centred and scaled, and which of ``CENTRES`` that is; ``own`` is that of images.

    Each modality has statistics of its own [MSAE §B]: those of the train captions, where the data has captions, else
    those of the vocabulary ``embeddings`` [V, d]. An SAE that was trained on texts has those already. ValueError for
    an unknown ``centre``, for ``captions`` where there are none, and for a vocabulary without spread.
    """
    one_of(centre, CENTRES, "app.centre")
    captions = opened.images("train").captions is not None
    if centre == "auto":
        centre = "images" if opened.cfg["features"] == "text" else "captions" if captions else "vocabulary"
    if centre == "captions":
        if not captions:
            raise ValueError("app.centre=captions, but the data set has no captions; set app.centre=vocabulary.")
        store = opened.store("train", "text")
        return Normalizer(store.d_in, store.mean, store.std), centre
    if centre == "vocabulary":
        return Normalizer(embeddings.shape[1], *moments(embeddings)), centre
    return own, centre


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] and scalar deviation of features [n, d]."""
    mean = features.mean(0)
    return mean, (features - mean).square().mean().sqrt()


METHODS = ("decoder", "activation", "labels")

MEASURES = {"decoder": "cosine", "activation": "correlation"}  # of a latent and a word

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
    threshold: float
    words: list[str]
    same: int
    centre: str
    latents: np.ndarray
    match: Match
    other: Match | None
    chance: dict[str, dict[str, dict[str, float]]]
    texts: Tensor

    @property
    def measure(self) -> str:
        """What its scores are."""
        return MEASURES[self.method]


def chosen_method(opened: Run, wanted: str) -> str:
    """``wanted``, or for ``auto`` the first of ``METHODS`` that the run allows.

    ValueError for an unknown one, and for one that the run's features or encoder do not allow.
    """
    one_of(wanted, ("auto", *METHODS), "app.method")
    if wanted == "labels":
        return wanted
    features, kinds = opened.cfg["features"], opened.backbone.kinds
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


def name_by_text(opened: Run, method: str, latents: np.ndarray, cfg: DictConfig) -> TextNames:
    """Match ``latents`` [n] with the vocabulary that ``cfg.app`` describes, and random ones with the same thresholds.

    ValueError for options that are none or cannot be met.
    """
    options = cfg.app
    if options.b_pre not in ("keep", "remove"):
        raise ValueError(f"Unknown app.b_pre={options.b_pre}; choose keep (the paper's choice) or remove.")
    vocabulary = _vocabulary(opened, options)
    found = _by_decoder if method == "decoder" else _by_activation
    return found(opened, latents, vocabulary, cfg)


def image_embeddings(opened: Run, split: str) -> Tensor:
    """Embeddings [n, d] float32 of the images of ``split``, in their order; extracted if missing."""
    if opened.cfg["features"] == "embedding":
        return torch.from_numpy(opened.features(split))
    return opened.store(split, "embedding").features(slice(None))[:, 0].float()


def _vocabulary(opened: Run, options: DictConfig) -> Vocabulary:
    wanted = options.vocabulary
    if wanted == "auto":
        wanted = "demo" if opened.source.backbone["size"] == "tiny" else "imagenet22k"
    words = read_words(wanted, opened.images("train").class_names)
    found = embed(words, list(options.templates), opened.backbone)
    if len(found.words) < 2:
        raise ValueError(
            f"The text tower of {opened.backbone.title} takes all {len(words)} words of app.vocabulary={wanted} for "
            "one and the same; choose words that it knows."
        )
    return found


def _by_decoder(opened: Run, latents: np.ndarray, vocabulary: Vocabulary, cfg: DictConfig) -> TextNames:
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
        "decoder", options.thresholds.cosine, vocabulary.words, vocabulary.same, centre, latents,
        matched(rows, texts), matched(rows, texts_other), chance, texts if keep else texts_other,
    )  # fmt: skip


def _by_activation(opened: Run, latents: np.ndarray, vocabulary: Vocabulary, cfg: DictConfig) -> TextNames:
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
        "activation", options.thresholds.correlation, vocabulary.words, vocabulary.same, centre,
        latents, matched(correlations(codes, fits)), None, chance, texts,
    )  # fmt: skip
