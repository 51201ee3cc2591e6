"""Turning latents inside a vision-language model's vision tower, and reading what it then says [MS score, steering]."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from sae_lightning.apps.app import app
from sae_lightning.apps.names import names_of
from sae_lightning.apps.steering import page
from sae_lightning.apps.steering.latents import SteeredLatent, choose, diffmean
from sae_lightning.apps.steering.trials import (
    GOALS,
    METHODS,
    Pool,
    SteeredModel,
    best_alphas,
    by_latent,
    concept_embedding,
    draw_pool,
    headlines,
    own_class_share,
    similarities,
    trials,
    with_class_names,
)
from sae_lightning.backbones.backbone import Backbone
from sae_lightning.backbones.registry import load_backbone
from sae_lightning.backbones.settings import SIZES
from sae_lightning.runs.results import Result
from sae_lightning.runs.run import Run
from sae_lightning.vlms import load_vlm
from sae_lightning.vlms.steering import check_fit, steered_captions

TABLE, CAPTIONS = "steering.parquet", "captions.parquet"
TRIED = 4  # pictures that tell whether the model's tower is the run's encoder
EXAMPLES = 3  # pictures a latent and goal on the page


@app("steering")
def run(runs: Sequence[Run], cfg: DictConfig) -> Result:
    """Turn the purest latents of a run up and down, beside random ones and DiffMean.

    Latents are chosen on train, each method's strength on val; the figures are those of ``cfg.split``. ValueError for
    a run whose encoder, layer or features are not those of the model's vision tower, and for pictures without classes.
    """
    (opened,), options = runs, cfg.app
    vlm = load_vlm(options.vlm, cfg.device)
    train, val, shown = (opened.images(split) for split in ("train", "val", cfg.split))
    if len(train.class_names) < 2:
        raise ValueError("Steering is scored by the classes that captions name; this data set has only one class.")
    store = opened.store("train")
    layer = check_fit(vlm, store, [train[i] for i in range(min(TRIED, len(store)))])
    steered = SteeredModel(vlm, opened.sae, layer, options.tokens, options.keep_error)
    top = max(options.top, *options.top_k)
    turned = choose(opened.codes("train"), train.labels, options.latents, top, options.purity, cfg.seed)
    means = {t.label: diffmean(opened.features("train"), train.labels == t.label) for t in turned}

    classes = sorted({t.label for t in turned})
    pools = {
        split: draw_pool(vlm, images, classes, n, cfg.seed)
        for split, images, n in (("val", val, options.images), ("test", shown, options.tested))
    }
    judging = CaptionJudge(opened, options)
    tried = {(goal, method): list(options[goal]) for goal, method in product(GOALS, METHODS)}
    on_val = judging.add(trials(steered, turned, pools["val"], means, tried, options.images), turned)
    curves = by_latent(on_val)
    best = best_alphas(curves)
    on_test = judging.add(trials(steered, turned, pools["test"], means, best, options.tested), turned)
    table = by_latent(on_test)

    both = [part.assign(split=split) for part, split in ((curves, "val"), (table, cfg.split))]
    captions = [part.assign(split=split) for part, split in ((on_val, "val"), (on_test, cfg.split))]
    tables = {
        TABLE: pd.concat(both, ignore_index=True).assign(mode="set"), CAPTIONS: pd.concat(captions, ignore_index=True)
    }  # fmt: skip

    cost = reconstruction_cost(steered, pools["test"])
    called = names_of(opened)
    names = [called[t.latent] for t in turned]
    said = examples(steered, turned[: options.shown], pools["test"], options)
    sections = [
        page.captions_section(turned, names, train, shown, said, options),
        page.doses(curves, list(options.top_k), judging.backbone.title),
        page.latents(turned, names, table, best, options),
    ]  # fmt: skip
    numbers = {
        "vlm": vlm.title, "judge": judging.backbone.title, "layer": layer, "cost": cost,
        "captions": len(on_val) + len(on_test),
        "best": [{"goal": goal, "method": method, "alpha": a[0]} for (goal, method), a in best.items()],
    }  # fmt: skip
    lead = [*page.lead(len(turned), vlm.title, options), page.cost_note(cost, options.keep_error)]
    lines = headlines(table, best, options.top_k)
    return Result("Steering a vision-language model", lines, lead, sections, tables, numbers=numbers)


class CaptionJudge:
    """The image–text encoder ``options.judge`` and what it makes of the train images of ``opened``."""

    def __init__(self, opened: Run, options: DictConfig) -> None:
        node = judge_node(options.judge, opened.source.backbone["size"])
        self.backbone: Backbone = load_backbone(node)
        judging = opened.source.replace(backbone=node, features="embedding")
        self.embeddings: Tensor = judging.store("train").features(slice(None)).squeeze(1)
        self.top_k: Sequence[int] = list(options.top_k)
        self.classes = opened.images("train").class_names

    def add(self, captions: pd.DataFrame, turned: Sequence[SteeredLatent]) -> pd.DataFrame:
        """``captions`` with ``similarity_K``, the cosine of the text with the mean embedding of the latent's first K
        images, and ``gain_K``, how much that is above the unsteered caption's, for each K."""
        keys = list(product(turned, self.top_k))
        concepts = torch.stack([concept_embedding(self.embeddings, t.top, k) for t, k in keys])
        row = {(t.latent, k): i for i, (t, k) in enumerate(keys)}
        after, before = (self._cosines(captions[column], concepts) for column in ("caption", "before"))
        found = {}
        for k in self.top_k:
            columns = [row[latent, k] for latent in captions["latent"]]
            found[f"similarity_{k}"] = after[np.arange(len(captions)), columns]
            found[f"gain_{k}"] = found[f"similarity_{k}"] - before[np.arange(len(captions)), columns]
        return captions.assign(**found)

    def _cosines(self, captions: pd.Series, concepts: Tensor) -> np.ndarray:
        texts = [with_class_names(caption, self.classes) for caption in captions]
        return similarities(texts, self.backbone.encode_text, concepts).numpy()


def judge_node(judge: DictConfig, size: str) -> dict[str, Any]:
    """The judge's backbone node; of the ``size`` of the run's own encoder unless it names one."""
    node: Any = OmegaConf.to_container(judge, resolve=False)  # its size refers to a data node that is not there
    return node | {"size": node["size"] if node["size"] in SIZES else size}


def reconstruction_cost(steered: SteeredModel, pool: Pool) -> dict[str, float]:
    """The share of captions that name their picture's class, plain and with all tokens encoded and decoded."""
    plainly = own_class_share(pool.captions, pool.images, pool.rows)
    decoded = steered.reconstructed(pool.images, pool.rows)
    return {"plain": plainly, "reconstructed": own_class_share(decoded, pool.images, pool.rows), "n": len(pool.rows)}


def examples(
    steered: SteeredModel, turned: Sequence[SteeredLatent], pool: Pool, options: DictConfig
) -> list[dict[str, list[tuple[int, str, list[str]]]]]:
    """For each latent and goal a few pictures (rows of the pool's images), unsteered captions, captions at every α."""
    found = []
    for t in turned:
        one = {}
        for goal in GOALS:
            at = pool.suited(t.label, goal, EXAMPLES)
            said = steered_captions(
                steered.vlm, steered.sae, [pool.images[i] for i in pool.rows[at].tolist()], t.latent,
                [a * t.peak for a in options[goal]], layer=steered.layer, tokens=steered.tokens,
                keep_error=steered.keep_error,
            )  # fmt: skip
            columns = list(zip(*said, strict=True))
            one[goal] = [(int(pool.rows[i]), pool.captions[i], list(c)) for i, c in zip(at, columns, strict=True)]
        found.append(one)
    return found
