"""Stability: which latents recur over seeds, expansions, variants and backbones [MSAE App. H]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from tqdm.auto import tqdm

from sae_lightning.apps.app import app
from sae_lightning.apps.stability import page
from sae_lightning.apps.stability.activations import SAME_START, View, views_of
from sae_lightning.apps.stability.pairs import (
    ACTIVATION,
    RELATIONS,
    chosen_pairs,
    interval,
    matched_activations,
    matched_directions,
)
from sae_lightning.apps.stability.universal import set_name, sets_of, universal
from sae_lightning.rendering.page import Note, plural
from sae_lightning.runs.results import Headline, Result
from sae_lightning.runs.run import Run

PAIRS, MATCHES, UNIVERSAL = "pairs.parquet", "matches.parquet", "universal.parquet"
WORDS = {
    "seed": "runs that differ by their seed", "expansion": "a dictionary and a larger one",
    "settings": "runs of other settings", "expansion, same start": "a dictionary and a larger one of the same seed",
    "settings, same start": "runs of other settings and the same seed", "backbone": "runs of different backbones",
}  # fmt: skip


@app("stability", together=True)
def run(runs: Sequence[Run], cfg: DictConfig) -> Result:
    """Match the latents of every two of the runs, and find those that all their backbones share.

    Runs on the same features are matched by their directions (decoder and encoder, with a random dictionary for a
    null), and all runs by their activations on shared images, on ``app.fit``, then measured on ``split``. Tables:
    ``pairs`` (a row a pair and kind), ``matches`` (a row a pair of latents), ``universal``. ValueError for a single
    run, equal splits, or runs without common images.
    """
    options = cfg.app
    if len(runs) < 2:
        raise ValueError(
            f"Stability compares runs, and only {runs[0].name} was given; give several (run='batchtopk-*')."
        )
    if options.fit == cfg.split:
        raise ValueError(
            f"app.fit and split are both {cfg.split}; latents must be measured on other images than they were matched "
            "on: set split=test or app.fit=train."
        )
    rng = np.random.default_rng(cfg.seed)
    views, ids = views_of(
        runs, options.fit, cfg.split, options.images, options.min_images, options.latents, rng
    )  # fmt: skip
    pairs, matches, in_all = matched(views, options.pairs, options.candidates, rng)
    sets, tables = sets_of(views), []
    found = []
    for number, of in enumerate(tqdm(sets, desc="Universal latents", unit="set", leave=False)):
        table, numbers = universal(of, options.universal.latents, options.universal.shuffles, rng)
        tables.append(long_form(table, of, number))
        found.append((of, table, numbers))
    in_sets = pd.concat(tables, ignore_index=True) if tables else long_form(pd.DataFrame(), [], 0)
    headlines = [*pair_headlines(pairs), *(line for each in found for line in universal_headlines(*each))]
    about = f"{len(views)} runs on {views[0].opened.store(options.fit).data}"
    n_pairs = len(pairs[["run_a", "run_b"]].drop_duplicates())
    numbers = {
        "runs": [view.name for view in views], "pairs": n_pairs, "pairs_in_all": in_all,
        "images": {split: len(each) for split, each in ids.items()},
        "universal": [{"runs": [view.name for view in of], **numbers} for of, _, numbers in found],
    }  # fmt: skip
    intervals = (
        "Intervals: t intervals over a pair's latents, which do not tell what other trainings would vary; of several "
        "pairs their means." + (f" {n_pairs} of {in_all} pairs were matched (app.pairs)." if n_pairs < in_all else "")
    )
    return Result(
        "Stability of latents", headlines, [page.LEAD, Note(intervals)],
        page.sections(views, pairs, matches, found, ids, options, cfg.split),
        {PAIRS: pairs, MATCHES: matches, UNIVERSAL: in_sets}, numbers=numbers, about=about,
    )  # fmt: skip


def matched(
    views: Sequence[View], at_most: int, candidates: int, rng: np.random.Generator
) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """The table of pairs, that of matched latents, and how many pairs of runs there are in all."""
    pairs, in_all = chosen_pairs(views, at_most)
    rows, tables = [], []
    for how, one, two in tqdm(pairs, desc="Matching", unit="pair", leave=False):
        parts = [matched_activations(one, two, rng, candidates)]
        if how != "backbone":
            parts.insert(0, matched_directions(one, two, rng))
        for summaries, table in parts:
            rows += [{"relation": how, **summary} for summary in summaries]
            tables.append(table.assign(relation=how))
    return pd.DataFrame(rows), pd.concat(tables, ignore_index=True), in_all


def long_form(table: pd.DataFrame, views: Sequence[View], number: int) -> pd.DataFrame:
    """One row a member of a universal latent: ``set``, ``rank``, ``run``, ``latent``, and the tuple's figures."""
    columns = ["set", "rank", "run", "latent", "firing", "score", "held_out", "classes"]
    parts = [
        table[["rank", "score", "held_out", "classes"]].assign(
            set=number, run=view.name, latent=table[f"latent_{i}"],
            firing=view.fired[table[f"latent_{i}"]] / view.fit.n_images,
        )
        for i, view in enumerate(views)
    ]  # fmt: skip
    return pd.concat(parts)[columns].sort_values(["rank"], kind="stable") if parts else pd.DataFrame(columns=columns)


def pair_headlines(pairs: pd.DataFrame) -> list[Headline]:
    """Decoder cosines of runs on the same features beside a random dictionary's, or where they start alike beside the
    untrained start's, and held-out correlations of different backbones beside those of class means.

    Means over pairs, with the mean bounds of their intervals.
    """
    lines = []
    for how in RELATIONS[:-1]:
        of = pairs[(pairs["relation"] == how) & (pairs["kind"] == "decoder")]
        if len(of):
            what = f"decoder cosine of matched latents, {WORDS[how]} ({plural(len(of), 'pair')})"
            bounds = float(of["low"].mean()), float(of["high"].mean())
            baseline = (float(of["start_mean"].mean()), "one's untrained start") if how.endswith(SAME_START) else (
                float(of["null_mean"].mean()), "matched to a random dictionary")  # fmt: skip
            lines.append(Headline(what, float(of["mean"].mean()), *baseline, bounds))
    of = pairs[(pairs["relation"] == "backbone") & (pairs["kind"] == ACTIVATION)]
    if len(of):
        what = f"held-out correlation of matched latents, {WORDS['backbone']} ({plural(len(of), 'pair')})"
        bounds = float(of["held_out_low"].mean()), float(of["held_out_high"].mean())
        known = "classes_mean" in of and of["classes_mean"].notna().all()
        baseline = (float(of["classes_mean"].mean()), "what class means alone give") if known else (
            float(of["null_mean"].mean()), "matched on shuffled images")  # fmt: skip
        lines.append(Headline(what, float(of["held_out_mean"].mean()), *baseline, bounds))
    return lines


def universal_headlines(views: Sequence[View], table: pd.DataFrame, numbers: dict) -> list[Headline]:
    """How many latents all backbones of a set share beside what shuffled images give, and how alike they are."""
    name = f"shared by {plural(len(views), 'backbone')} ({set_name(views)})"
    lines = [Headline(f"latents {name}", numbers["found"], numbers["by_chance"], "found on shuffled images")]
    if len(table):
        known = table["classes"].notna().all()
        lines.append(Headline(
            f"held-out correlation of latents {name}, lowest of all pairs", float(table["held_out"].mean()),
            float(table["classes"].mean()) if known else None, "what class means alone give" if known else "",
            interval(table["held_out"].to_numpy()) if len(table) > 1 else None,
        ))  # fmt: skip
    return lines
