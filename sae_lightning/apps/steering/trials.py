"""The captions that steering is judged by: every latent, goal, method and strength, one row a caption."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_lightning.apps.statistics import mean_interval
from sae_lightning.apps.steering.latents import SteeredLatent
from sae_lightning.data import ImageData
from sae_lightning.runs.results import Headline
from sae_lightning.saes import SAE
from sae_lightning.vlms import VLM
from sae_lightning.vlms.steering import steer, steered_captions
from sae_lightning.vlms.words import concepts_in, mentions, words_for


@dataclass(frozen=True)
class CaptionStyle:
    """How long unsteered captions are, in words."""

    shortest: int
    longest: int

    @staticmethod
    def of(captions: Sequence[str]) -> CaptionStyle:
        lengths = [len(caption.split()) for caption in captions]
        return CaptionStyle(min(lengths), max(lengths))

    def fits(self, caption: str) -> bool:
        """Whether ``caption`` is as long as an unsteered one, and says no word or pair of words twice in a row."""
        words = caption.lower().split()
        if not self.shortest <= len(words) <= self.longest:
            return False
        twice = any(words[i] == words[i + 1] for i in range(len(words) - 1))
        return not twice and not any(words[i : i + 2] == words[i + 2 : i + 4] for i in range(len(words) - 3))


def judge(caption: str, concept: str, goal: str, classes: Sequence[str], style: CaptionStyle) -> tuple[bool, bool]:
    """Whether ``caption`` reaches the ``goal`` for ``concept``, and whether it also still is a caption of one thing.

    ``insert``: it names the concept; ``suppress``: it does not. The second demands besides that it fits ``style`` and
    names no class other than the concept (insert), or at most one (suppress). Adapted from the paper's two criteria,
    concept and prompt, which a larger model judges there.
    """
    named = concepts_in(caption, classes)
    others = [name for name in named if name != concept]
    reached = (concept in named) == (goal == "insert")
    return reached, reached and len(others) <= (goal == "suppress") and style.fits(caption)


def kept(before: str, after: str, classes: Sequence[str]) -> float:
    """The share of the words of ``before``, names of ``classes`` left out, that ``after`` still says; nan of none."""
    names = {word for name in classes for phrase in words_for(name) for word in phrase.split()}
    words = set(before.lower().split()) - names
    return len(words & set(after.lower().split())) / len(words) if words else float("nan")


def similarities(captions: Sequence[str], encode: Callable[[Sequence[str]], Tensor], concepts: Tensor) -> Tensor:
    """Cosine [n, m] of the texts of ``captions`` with ``concepts`` [m, d]; each text is encoded once, an empty one as
    a full stop's."""
    different = sorted({caption or "." for caption in captions})
    place = {caption: i for i, caption in enumerate(different)}
    parts = [encode(different[at : at + 256]).float().cpu() for at in range(0, len(different), 256)]
    texts = torch.nn.functional.normalize(torch.cat(parts), dim=1)
    return (texts @ torch.nn.functional.normalize(concepts, dim=1).T)[[place[c or "."] for c in captions]]


def concept_embedding(embeddings: Tensor, top: Sequence[int], k: int) -> Tensor:
    """Mean of the unit embeddings of the first ``k`` of a latent's ``top`` images, [d]; ``embeddings`` [n, d]."""
    return torch.nn.functional.normalize(embeddings[list(top[:k])].float(), dim=1).mean(0)


def interval(each: Sequence[float] | np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of the mean of one figure a latent, by percentile bootstrap over latents; None of fewer than 3."""
    values = np.asarray(each, dtype=np.float64)
    values = values[~np.isnan(values)]
    if len(values) < 3:
        return None
    return mean_interval(values, seed)


def with_class_names(caption: str, classes: Sequence[str]) -> str:
    """``caption`` with each other name of a class replaced by the class's own, which is all that a small text tower
    may know ("a boat at sea" -> "a ship at sea")."""
    text = f" {caption.lower()} "
    for name in classes:
        for phrase in words_for(name):
            if phrase != name.lower():
                text = text.replace(f" {phrase} ", f" {name} ").replace(f" {phrase}s ", f" {name} ")
    return text.strip()


def own_class_share(captions: Sequence[str], images: ImageData, rows: np.ndarray) -> float:
    """The share of ``captions`` of the pictures ``rows`` that name the picture's class."""
    classes = [images.class_names[label] for label in images.labels[rows]]
    return float(np.mean([mentions(caption, name) for caption, name in zip(captions, classes, strict=True)]))


def headlines(
    table: pd.DataFrame, best: Mapping[tuple[str, str], Sequence[float]], top_k: Sequence[int]
) -> list[Headline]:
    """Figures of the SAE's latents beside both baselines, each method at its ``best`` α; means over latents."""
    near = f"gain_{max(top_k)}"
    lines = (
        ("insert", "share", "captions that name the concept, its latent turned up", ("random", "diffmean")),
        ("insert", "passed", "… and name no other class and stay well formed", ("random", "diffmean")),
        ("insert", "kept", "other words that those captions keep", ("diffmean",)),
        (
            "insert",
            near,
            f"rise of the text's cosine with the latent's top {max(top_k)} images",
            ("random", "diffmean"),
        ),
        ("suppress", "share", "captions that stop naming the concept, its latent turned down", ("random", "diffmean")),
        ("suppress", "passed", "… and name at most one other class and stay well formed", ("random", "diffmean")),
        ("suppress", "kept", "other words that those captions keep", ("diffmean",)),
    )
    titles = {"diffmean": "DiffMean", "random": "random latents"}
    found = []
    for goal, figure, what, baselines in lines:
        each = {m: part[figure] for m, part in table[table.goal == goal].groupby("method")}
        for against in baselines:
            if {"sae", against} <= set(each):
                label = f"{titles[against]} at {best[goal, against][0]:g} peaks (SAE at {best[goal, 'sae'][0]:g})"
                ours, theirs = float(each["sae"].mean()), float(each[against].mean())
                found.append(Headline(what, ours, theirs, label, interval(each["sae"])))
    for goal in ("insert", "suppress"):
        gap = paired(table, goal, "passed", "diffmean")
        if len(gap):
            found.append(
                Headline(f"both criteria, {goal}: SAE minus DiffMean", gap.mean(), 0.0, "no difference", interval(gap))
            )
    return found


def paired(table: pd.DataFrame, goal: str, figure: str, against: str) -> pd.Series:
    """The SAE's ``figure`` minus that of the method ``against``, one value a latent."""
    wide = table[table.goal == goal].pivot(index="latent", columns="method", values=figure)
    return (wide["sae"] - wide[against]).dropna() if {"sae", against} <= set(wide.columns) else pd.Series(dtype=float)


GOALS = ("insert", "suppress")

METHODS = ("sae", "random", "diffmean")


@dataclass(frozen=True)
class SteeredModel:
    """A model with an SAE behind ``layer`` of its tower, and how codes are put back (see ``vlms.steer.edited``)."""

    vlm: VLM
    sae: SAE
    layer: int
    tokens: str
    keep_error: bool

    def reconstructed(self, images: ImageData, rows: np.ndarray) -> list[str]:
        """Captions with all tokens encoded and decoded, but no latent turned."""
        with steer(self.vlm, self.sae, [], self.layer, self.tokens):
            return self.vlm.captions([images[i] for i in rows.tolist()])


@dataclass(frozen=True)
class Pool:
    """Pictures ``rows`` of ``images``, in random order, with the ``captions`` that the model gives unsteered."""

    images: ImageData
    rows: np.ndarray
    captions: list[str]

    def suited(self, label: int, goal: str, n: int) -> list[int]:
        """Places of at most ``n`` pictures that the ``goal`` can be reached on: of another class and not said to be of
        class ``label`` (insert), or of the class and said to be (suppress)."""
        insert, name = goal == "insert", self.images.class_names[label]
        own = self.images.labels[self.rows] == label
        return [
            i
            for i in np.flatnonzero(own != insert).tolist()
            if mentions(self.captions[i], name) != insert
        ][:n]  # fmt: skip


def draw_pool(vlm: VLM, images: ImageData, classes: Sequence[int], n: int, seed: int) -> Pool:
    """A pool of ``2 n`` pictures of each of ``classes`` and ``n`` of any class, as far as there are."""
    order = np.random.default_rng(seed).permutation(len(images))
    labels = images.labels[order]
    taken = np.arange(len(order)) < n
    for label in classes:
        taken[np.flatnonzero(labels == label)[: 2 * n]] = True
    rows = order[taken]
    return Pool(images, rows, vlm.captions([images[i] for i in rows.tolist()]))


def trials(
    steered: SteeredModel, turned: Sequence[SteeredLatent], pool: Pool, means: Mapping[int, Tensor],
    alphas: Mapping[tuple[str, str], Sequence[float]], n: int,
) -> pd.DataFrame:  # fmt: skip
    """Captions of at most ``n`` pictures of ``pool`` a latent and goal, for all ``alphas`` [goal, method].

    α counts peaks of the latent. ``sae`` sets the latent to it; ``random`` another latent, to the same value;
    ``diffmean`` adds the mean difference ``means`` of the latent's class to each token, by the norm of the change that
    the SAE's edit makes to it, and keeps the tokens otherwise. Columns: latent, concept, goal, method, alpha, value,
    image, before, caption, reached, passed, kept.
    """
    style, classes = CaptionStyle.of(pool.captions), pool.images.class_names
    places = {(t.latent, goal): pool.suited(t.label, goal, n) for t in turned for goal in GOALS}
    total = sum(len(places[t.latent, goal]) * len(alphas[goal, m]) for t in turned for goal in GOALS for m in METHODS)
    rows: list[dict[str, Any]] = []
    with tqdm(total=total, desc=f"Captions ({pool.images.split})", unit="caption") as bar:
        for t in turned:
            for goal in GOALS:
                at, concept = places[t.latent, goal], classes[t.label]
                pictures = [pool.images[i] for i in pool.rows[at].tolist()]
                for method in METHODS:
                    values = [alpha * t.peak for alpha in alphas[goal, method]]
                    captions = steered_captions(
                        steered.vlm, steered.sae, pictures, t.random if method == "random" else t.latent, values,
                        layer=steered.layer, tokens=steered.tokens,
                        keep_error=steered.keep_error or method == "diffmean",
                        direction=means[t.label] if method == "diffmean" else None, said=bar.update,
                    )  # fmt: skip
                    for alpha, value, said in zip(alphas[goal, method], values, captions, strict=True):
                        for i, caption in zip(at, said, strict=True):
                            reached, passed = judge(caption, concept, goal, classes, style)
                            rows.append({
                                "latent": t.latent, "concept": concept, "goal": goal, "method": method, "alpha": alpha,
                                "value": value, "image": pool.images.image_ids[pool.rows[i]],
                                "before": pool.captions[i], "caption": caption, "reached": reached, "passed": passed,
                                "kept": kept(pool.captions[i], caption, classes),
                            })  # fmt: skip
    return pd.DataFrame(rows)


def by_latent(captions: pd.DataFrame) -> pd.DataFrame:
    """Means of all figures over the pictures of each (latent, concept, goal, method, alpha), and their number.

    ``share`` is that of captions that reach the goal, ``passed`` of those that also stay captions of one thing.
    """
    keys = ["latent", "concept", "goal", "method", "alpha", "value"]
    figures = [
        c for c in captions.columns if c in ("reached", "passed", "kept") or c.startswith(("similarity", "gain"))
    ]
    grouped = captions.groupby(keys, sort=False)
    table = grouped[figures].mean().rename(columns={"reached": "share"})
    return table.assign(images=grouped.size()).reset_index()


def best_alphas(table: pd.DataFrame) -> dict[tuple[str, str], list[float]]:
    """For each goal and method the α with the most passes over all latents, of equal ones the weakest."""
    mean = table.groupby(["goal", "method", "alpha"])["passed"].mean().reset_index()
    mean["size"] = mean["alpha"].abs()
    mean = mean.sort_values(["passed", "size"], ascending=[False, True], kind="stable")
    first = mean.drop_duplicates(["goal", "method"])
    return {(goal, method): [float(a)] for goal, method, a in zip(first.goal, first.method, first.alpha, strict=True)}
