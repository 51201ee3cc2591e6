"""The captions that steering is judged by: every latent, goal, method and strength, one row a caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor
from tqdm.auto import tqdm

from sae_lightning.apps.steering.captions import steered_captions
from sae_lightning.apps.steering.latents import Turned
from sae_lightning.apps.steering.scores import Manner, judge, kept
from sae_lightning.data import ImageData
from sae_lightning.saes import SAE
from sae_lightning.vlms import VLM
from sae_lightning.vlms.concepts import mentions
from sae_lightning.vlms.steer import steer

GOALS = ("insert", "suppress")
METHODS = ("sae", "random", "diffmean")


@dataclass(frozen=True)
class Steered:
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
    steered: Steered, turned: Sequence[Turned], pool: Pool, means: Mapping[int, Tensor],
    alphas: Mapping[tuple[str, str], Sequence[float]], n: int,
) -> pd.DataFrame:  # fmt: skip
    """Captions of at most ``n`` pictures of ``pool`` a latent and goal, for all ``alphas`` [goal, method].

    α counts peaks of the latent. ``sae`` sets the latent to it; ``random`` another latent, to the same value;
    ``diffmean`` adds the mean difference ``means`` of the latent's class to each token, by the norm of the change that
    the SAE's edit makes to it, and keeps the tokens otherwise. Columns: latent, concept, goal, method, alpha, value,
    image, before, caption, reached, passed, kept.
    """
    manner, classes = Manner.of(pool.captions), pool.images.class_names
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
                            reached, passed = judge(caption, concept, goal, classes, manner)
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
