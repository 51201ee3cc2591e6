"""Similarity search: nearest images by features and by codes, and after turning a latent [MSAE §5.2, App. G.2]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from omegaconf import DictConfig, ListConfig

from sae_lightning.apps.app import app
from sae_lightning.apps.names import called, names_of
from sae_lightning.apps.search import page
from sae_lightning.apps.search.dose import (
    LATENT,
    OTHER,
    RANDOM,
    class_latents,
    dose_means,
    dose_table,
    spread_of,
)
from sae_lightning.apps.search.neighbours import (
    COSINE,
    FEATURES,
    KS,
    MANHATTAN,
    SHUFFLED,
    Query,
    agreement_of_shared,
    precisions,
    queries_of,
    spaces,
)
from sae_lightning.apps.statistics import mean_interval
from sae_lightning.evaluation.by_latent import dominant
from sae_lightning.registry import one_of
from sae_lightning.runs.results import Headline, Result
from sae_lightning.runs.run import Run

PRECISION, DOSE, SHOWN = "precision.parquet", "dose.parquet", "neighbours.parquet"
UNITS = ("spread", "code")


@app("search")
def run(runs: Sequence[Run], cfg: DictConfig) -> Result:
    """Search a run's images.

    Tables: ``precision`` (method, k), ``dose`` (latent, arm, dose) and ``neighbours`` of the queries shown. ValueError
    for an SAE of text features, and with a sentence for options that do not fit.
    """
    (opened,) = runs
    if opened.cfg["features"] == "text":
        raise ValueError(f"{opened.name} was trained on captions; search needs a run on features of images.")
    options, split, seed = cfg.app, cfg.split, int(cfg.seed)
    images, features, codes = opened.images(split), opened.features(split), opened.codes(split)
    names, n_classes = names_of(opened), len(images.class_names)
    queries = queries_of(opened, split, options.queries, options.shown, seed)
    of_train = opened.images("train").labels
    label, purity, _ = dominant(opened.codes("train"), of_train, n_classes)
    titles = captions(names, label, purity, images.class_names)
    by_class = class_latents(opened.codes("train"), of_train, n_classes, 1)
    chosen = turned_latents(queries, options.turn.latents, names, by_class, seed)

    to, units = magnitudes(opened, list(options.turn.to), options.turn.unit)
    shown, rows = [], []
    for query, latents in zip(queries, chosen, strict=True):
        neighbours, about = page.shown_neighbours(
            query, features, codes, images, titles, options.neighbours, options.shared
        )
        rows += about
        turns = [
            (called(i, titles), page.shown_turned(opened.sae, query, i, to, units, features, images,
                                                        options.neighbours, options.turn.keep_error))
            for i in latents
        ]  # fmt: skip
        shown.append((query, neighbours, turns))

    scored = np.sort(np.random.default_rng(seed).permutation(len(images))[: options.scored])
    table, found = precisions(spaces(features, codes, opened.features("train").mean(0), seed), images.labels, scored)
    explained = {
        method: agreement_of_shared(codes, found[method], scored, images.labels, label, by, options.shared, seed)
        for method, by in ((MANHATTAN, "manhattan"), (COSINE, "cosine"))
    }
    doses = dose_table(
        opened, split, options.dose.latents, options.dose.images, list(options.dose.to), options.dose.neighbours, seed
    )
    means = dose_means(doses) if len(doses) else pd.DataFrame(columns=["of", "arm", "dose", "share", "low", "high"])

    lines = [*_of_precision(table), *_of_shared(explained), *_of_dose(means, doses, options.dose.neighbours)]
    numbers = {"precision": table.to_dict("records"), "dose": means.to_dict("records")}
    sections = [
        *page.scores(table, doses, means, len(scored), len(images), opened.cfg["features"] == "patch", options),
        page.queries_section(shown, options.turn.keep_error),
    ]
    tables = {PRECISION: table, DOSE: doses, SHOWN: pd.DataFrame(rows)}
    return Result("Similarity search", lines, [page.LEAD], sections, tables, numbers=numbers)


def turned_latents(
    queries: Sequence[Query], wanted: object, names: Sequence[str], by_class: Sequence[tuple[int, int]], seed: int
) -> list[list[int]]:
    """Which latents are turned on each query: those ``wanted``, by number or name, else one of another class.

    ``by_class`` are (latent, class). A name stands for the first latent of that name. ValueError for an unknown one.
    """
    if wanted is None:
        rng = np.random.default_rng(seed)
        others = [[latent for latent, c in by_class if c != query.label] for query in queries]
        return [[int(rng.choice(some))] if some else [] for some in others]
    several = list(wanted) if isinstance(wanted, (list, tuple, ListConfig)) else [wanted]
    return [[_latent(one, names) for one in several]] * len(queries)


def captions(names: Sequence[str], label: np.ndarray, purity: np.ndarray, classes: Sequence[str]) -> list[str]:
    """What latents are called on the page: their names, else in brackets the class that most of their activation is of.

    ``label`` and ``purity`` [d_sae] are that class (-1: never active) and its share.
    """
    return [
        name or (f"({classes[c]} {share:.0%})" if c >= 0 else "")
        for name, c, share in zip(names, label.tolist(), purity.tolist(), strict=True)
    ]


def magnitudes(opened: Run, to: Sequence[float], unit: str) -> tuple[list[float], list[str]]:
    """Code values for the magnitudes ``to`` in ``unit``, and what is printed beside each of them."""
    one_of(unit, UNITS, "app.turn.unit")
    if unit == "code":
        return [float(value) for value in to], ["" for _ in to]
    one = spread_of(opened)
    return [value * one for value in to], ["off" if value == 0 else f"{value:g} spread" for value in to]


def _latent(one: object, names: Sequence[str]) -> int:
    if str(one).isdecimal() and int(str(one)) < len(names):
        return int(str(one))
    if one and one in names:
        return list(names).index(str(one))
    known = sorted({name for name in names if name})
    raise ValueError(
        f"app.turn.latents names '{one}', which is neither a latent (0 to {len(names) - 1}) nor a name of one. Names "
        f"are: {', '.join(known[:20]) or 'none'}{' …' if len(known) > 20 else ''}."
    )


def _of_precision(table: pd.DataFrame) -> list[Headline]:
    at = table[table["k"] == max(KS)].set_index("method")
    lines = []
    for method, against in ((MANHATTAN, FEATURES), (COSINE, FEATURES), (COSINE, SHUFFLED)):
        ours = at.loc[method]
        interval = (float(ours["low"]), float(ours["high"]))
        what = f"precision@{max(KS)}, {method}"
        lines.append(Headline(what, float(ours["precision"]), float(at.loc[against, "precision"]), against, interval))
    return lines


def _of_shared(explained: dict[str, tuple[np.ndarray, np.ndarray]]) -> list[Headline]:
    lines = []
    for method, (top, random) in explained.items():
        if len(top):
            what = f"explaining latents of the pair's class, {method}"
            lines.append(Headline(what, float(top.mean()), float(random.mean()), "shared latents at random",
                                  mean_interval(top)))  # fmt: skip
    return lines


def _of_dose(means: pd.DataFrame, doses: pd.DataFrame, k: int) -> list[Headline]:
    """At the largest dose up and the largest down: the latents' share against each control's."""
    lines = []
    for of, verb in (("others", "up"), ("own", "down")):
        part = means[means["of"] == of]
        if not len(part):
            continue
        dose = part["dose"].max() if of == "others" else part["dose"].min()
        at = part[part["dose"] == dose].set_index("arm")
        ours = at.loc[LATENT]
        for arm in (OTHER, RANDOM):
            if arm in at.index:
                what = f"class of a latent in the {k} nearest, turned {verb} to {dose:g} spread"
                interval = (float(ours["low"]), float(ours["high"]))
                lines.append(Headline(what, float(ours["share"]), float(at.loc[arm, "share"]), arm, interval))
    return lines
