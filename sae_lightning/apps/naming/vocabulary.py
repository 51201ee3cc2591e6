"""The words that latents may be called by, and where they lie in the space that an SAE was trained in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from torch import Tensor

from sae_lightning.apps.opened import Opened
from sae_lightning.backbones import Backbone
from sae_lightning.saes import SAE, Normalizer
from sae_lightning.saes.input_norm import input_norm

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


def text_normalizer(opened: Opened, embeddings: Tensor, centre: str, own: Normalizer) -> tuple[Normalizer, str]:
    """How texts are centred and scaled, and which of ``CENTRES`` that is; ``own`` is that of images.

    Each modality has statistics of its own [MSAE §B]: those of the train captions, where the data has captions, else
    those of the vocabulary ``embeddings`` [V, d]. An SAE that was trained on texts has those already. ValueError for
    an unknown ``centre``, for ``captions`` where there are none, and for a vocabulary without spread.
    """
    if centre not in CENTRES:
        raise ValueError(f"Unknown app.centre={centre}; choose one of {', '.join(CENTRES)}.")
    captions = opened.images("train").captions is not None
    if centre == "auto":
        centre = "images" if opened.made["features"] == "text" else "captions" if captions else "vocabulary"
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
