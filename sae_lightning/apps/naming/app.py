"""What each latent stands for: words whose text embeddings its decoder row points at, and classes [MSAE §5.1, App. A].

Leaves ``naming.parquet``, one row a latent: ``latent``, ``alive`` (fires on a train image), ``label`` (the class with
most of its activation over the train images), ``purity`` (that class's share), ``images`` (that it fires on), and
``shown``: the name that other applications use, "" where there is none. With a vocabulary also ``method``, ``name``
(the nearest word), ``score`` (cosine or correlation with it), ``second_name``, ``second``, ``ratio``, and which
conditions of Table 3 it meets: ``above``, ``best``, ``above_best``, ``ratio_above``, ``all``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from scipy.sparse import csr_matrix

from sae_lightning.apps.app import app
from sae_lightning.apps.names import TABLE, label_names
from sae_lightning.apps.naming import page
from sae_lightning.apps.naming.match import (  # fmt: skip
    COLUMNS,
    CONDITIONS,
    Agreement,
    Measured,
    agreement,
    class_in,
    cosines,
    fit,
    like,
    match,
    of_concepts,
    of_latents,
    precision,
    standing,
)
from sae_lightning.apps.naming.vocabulary import (  # fmt: skip
    RANDOM_LATENTS,
    RANDOM_WORDS,
    TextNames,
    chosen_method,
    image_embeddings,
    name_by_text,
)
from sae_lightning.apps.statistics import share_interval
from sae_lightning.evaluation.by_latent import dominant, top_images
from sae_lightning.registry import one_of
from sae_lightning.runs.results import Headline, Result
from sae_lightning.runs.run import Run

RANDOM = 1000  # directions beside which held-out precision is put
LEAST = 5  # latents with both names, from which their agreement is a headline


@app("naming")
def run(runs: Sequence[Run], cfg: DictConfig) -> Result:
    """Name the latents of a run; ValueError with a sentence for options that do not fit it."""
    (opened,) = runs
    options = cfg.app
    one_of(options.named, CONDITIONS, "app.named")
    method = chosen_method(opened, options.method)
    classes = opened.images("train").class_names
    table = label_table(opened, options)
    latents = np.flatnonzero(table["alive"] if options.alive else np.ones(len(table), dtype=bool))
    text = None if method == "labels" else name_by_text(opened, method, latents, cfg)
    if text is not None:
        add_text(table, text, options)
    table["shown"] = shown_names(table, classes, options)
    by_chance = labels_by_chance(opened, options, cfg.seed)
    checks = checked(opened, table, text, cfg)
    numbers = (
        {"method": method, "labels_by_chance": by_chance}
        | _numbers(text, options)
        | {name: asdict(each) for name, each in checks.items()}
    )
    return Result(
        "What the latents stand for", headlines(table, text, checks, by_chance, options),
        [page.lead(text, table, options)], page.sections(opened, table, text, checks, cfg), {TABLE: table},
        numbers=numbers,
    )  # fmt: skip


def label_table(opened: Run, options: DictConfig) -> pd.DataFrame:
    """What the labels of the train images say of each latent; ``label`` is -1 without classes or images."""
    images = opened.images("train")
    label, purity, fired = dominant(opened.codes("train"), images.labels, len(images.class_names))
    told = len(images.class_names) > 1
    return pd.DataFrame({
        "latent": np.arange(len(label)), "alive": fired > 0, "label": label if told else np.full_like(label, -1),
        "purity": purity if told else np.zeros_like(purity), "images": fired,
    })  # fmt: skip


def labels_by_chance(opened: Run, options: DictConfig, seed: int) -> float:
    """Share of the latents that fire which have a pure label when labels are permuted over the train images."""
    images, codes, rng = opened.images("train"), opened.codes("train"), np.random.default_rng(seed)
    shares = []
    for _ in range(options.baseline.draws):
        _, purity, fired = dominant(codes, rng.permutation(images.labels), len(images.class_names))
        shares.append(is_pure(purity, fired, options).sum() / max((fired > 0).sum(), 1))
    return float(np.mean(shares))


def is_pure(purity: np.ndarray, images: np.ndarray, options: DictConfig) -> np.ndarray:
    """Whether a latent is one class's, by ``app.labels``."""
    return (purity >= options.labels.purity) & (images >= options.labels.images)


def add_text(table: pd.DataFrame, text: TextNames, options: DictConfig) -> None:
    """Put the matches with the vocabulary into ``table``; latents that were left out have no name and meet nothing."""
    near, at = text.match.latents, text.latents
    words = np.array(text.words, dtype=object)
    for column, values, nothing in (
        ("name", words[near.index], ""), ("score", near.score, np.nan), ("second_name", words[near.second_index], ""),
        ("second", near.second, np.nan), ("ratio", near.ratio, np.nan),
    ):  # fmt: skip
        table[column] = nothing
        table.loc[at, column] = values
    met = of_latents(text.match, text.threshold, options.thresholds.ratio)
    for condition, column in COLUMNS.items():
        table[column] = False
        table.loc[at, column] = met[condition]
    table["method"] = text.method


def shown_names(table: pd.DataFrame, classes: Sequence[str], options: DictConfig) -> list[str]:
    """The word of those latents that meet ``app.named``, else their class where they are pure enough, else ""."""
    limits = (options.labels.purity, options.labels.images)
    label, purity, images = (table[column].to_numpy() for column in ("label", "purity", "images"))
    by_label = label_names(label, purity, images, list(classes), *limits)
    if "name" not in table:
        return by_label
    by_text = table["name"].where(table[COLUMNS[options.named]], "")
    return [word or of_class for word, of_class in zip(by_text, by_label, strict=True)]


def checked(
    opened: Run, table: pd.DataFrame, text: TextNames | None, cfg: DictConfig
) -> dict[str, Measured | Agreement]:
    """What held-out images and labels say of the names; empty where there is nothing to say."""
    options, images = cfg.app, opened.images(cfg.split)
    classes = images.class_names
    codes = opened.codes(cfg.split)
    pure = is_pure(table["purity"].to_numpy(), table["images"].to_numpy(), options)
    of_label = np.where(pure, table["label"], -1)
    found: dict[str, Measured | Agreement | None] = {}
    if text is not None:
        named = np.flatnonzero(table[COLUMNS[options.named]])
        top = top_images(codes, options.top, named)
        of_word = {word: class_in(word, classes) for word in table["name"][named].unique()}
        of_text = np.array([of_word[word] for word in table["name"][named]], dtype=np.int64)
        found["text_precision"] = precision(top, of_text, images.labels, cfg.seed)
        where = dict(zip(text.words, range(len(text.words)), strict=True))
        words = np.array([where[word] for word in table["name"][named]], dtype=np.int64)
        found["random_precision"] = random_precision(opened, text, cfg) if text.method == "decoder" else None
        found["standing"] = standing(top, words, fit(image_embeddings(opened, cfg.split), text.texts), cfg.seed)
        found["agreement"] = agreement(of_text, of_label[named], cfg.seed)
    labelled = np.flatnonzero(of_label >= 0)
    top = top_images(codes, options.top, labelled)
    found["label_precision"] = precision(top, of_label[labelled], images.labels, cfg.seed)
    return {name: each for name, each in found.items() if each is not None}


def random_precision(opened: Run, text: TextNames, cfg: DictConfig) -> Measured | None:
    """``precision`` of random directions like the train features that pass for named by the same threshold.

    What they fire on is the positive part of the images' projections. None where none gets the name of a class.
    """
    normalize, images = opened.sae.normalizer.normalize, opened.images(cfg.split)
    generator = torch.Generator().manual_seed(cfg.seed)
    train, held_out = (normalize(torch.from_numpy(opened.features(split))) for split in ("train", cfg.split))
    directions = like(train, RANDOM, generator)
    near = match(cosines(directions, text.texts), len(directions), len(text.words)).latents
    named = np.flatnonzero(near.score > text.threshold)
    of_text = np.array([class_in(text.words[i], images.class_names) for i in near.index[named]], dtype=np.int64)
    codes = csr_matrix((held_out @ directions[torch.from_numpy(named)].T).clamp_min(0).numpy())
    top = top_images(codes, cfg.app.top)
    return precision(top, of_text, images.labels, cfg.seed)


def headlines(
    table: pd.DataFrame, text: TextNames | None, checks: dict[str, Measured | Agreement], by_chance: float,
    options: DictConfig,
) -> list[Headline]:  # fmt: skip
    """The figures beside what chance gives; ``by_chance`` as ``labels_by_chance`` gives it."""
    lines, top, alive = [], f"top-{options.top} held-out images", int(table["alive"].sum())
    pure = int(is_pure(table["purity"].to_numpy(), table["images"].to_numpy(), options).sum())
    of_one_class = Headline(
        f"latents of one class (purity ≥ {options.labels.purity:g}), share of {alive}", pure / max(alive, 1), by_chance,
        "labels permuted over the images", share_interval(pure, max(alive, 1)),
    )  # fmt: skip
    if text is not None:
        n, above = len(text.latents), int(table["above"].sum())
        chance = {kind: counts["above"]["mean"] / n for kind, counts in text.chance.items()}
        what = f"latents with a word ({text.measure} > {text.threshold:g}), share of {n}"
        interval = share_interval(above, n)
        lines += [
            Headline(what, above / n, chance[RANDOM_WORDS], "random words of equal mean and covariance", interval),
            Headline(what, above / n, chance[RANDOM_LATENTS], _null(text.method), interval),
        ]
    for name, what, against in (
        ("text_precision", f"{top} of the class in the latent's word", "words permuted among these latents"),
        ("standing", f"other words that fit the {top} worse than the latent's own", "words permuted"),
        ("label_precision", f"{top} of the class that the latent is labelled with", "labels permuted"),
    ):
        figure = checks.get(name)
        if name == "label_precision":
            lines.append(of_one_class)
        if isinstance(figure, Measured):
            title = f"{what} ({figure.latents} latents)"
            lines.append(Headline(title, figure.value, figure.chance, against, figure.interval))
        other = checks.get("random_precision")
        if name == "text_precision" and isinstance(figure, Measured) and isinstance(other, Measured):
            against = f"random directions with a word ({other.latents})"
            lines.append(Headline(title, figure.value, other.value, against, figure.interval))
    both = checks.get("agreement")
    if isinstance(both, Agreement) and both.latents >= LEAST:
        lines.append(Headline(
            f"word and label name the same class ({both.latents} latents)", both.share, both.chance, "names permuted",
            both.share_interval,
        ))  # fmt: skip
        if both.kappa is not None:
            lines.append(Headline("Cohen's κ of word and label", both.kappa, 0.0, "no agreement", both.kappa_interval))
    return lines


def _null(method: str) -> str:
    decoder = method == "decoder"
    return "random directions of the features' covariance" if decoder else "codes beside other images' embeddings"


def _numbers(text: TextNames | None, options: DictConfig) -> dict[str, Any]:
    if text is None:
        return {}
    ratio = options.thresholds.ratio
    met = of_latents(text.match, text.threshold, ratio)
    return {
        "words": len(text.words), "same_words": text.same, "centre": text.centre,
        "of_latents": {name: int(passing.sum()) for name, passing in met.items()},
        "of_concepts": of_concepts(text.match, text.threshold, ratio), "chance": text.chance,
    }  # fmt: skip
