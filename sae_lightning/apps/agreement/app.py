"""Do people agree with the MS score? Pairs of latents judged on a page, and the analysis [ms-score-vlm, user study]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf

from sae_lightning.apps.agreement import page
from sae_lightning.apps.agreement.analysis import agreement, by_difference, majority, raters, with_scores
from sae_lightning.apps.agreement.study import (
    COLLECT,
    SCORES,
    SIMULATED,
    collecting_page,
    draw_pairs,
    latent_scores,
    read_judgements,
    simulated_judgements,
    study_of,
)
from sae_lightning.apps.app import app
from sae_lightning.evaluation.similarity import SimilarityEncoder
from sae_lightning.rendering.page import Section
from sae_lightning.runs.results import Headline, Result
from sae_lightning.runs.run import Run

PAIRS, LATENTS, TABLE, MADE_UP = "pairs.parquet", "latents.parquet", "agreement.parquet", "judgements-simulated.csv"


@app("agreement", together=True)
def run(runs: Sequence[Run], cfg: DictConfig) -> Result:
    """Write the collecting page for latents of these runs, or analyse what was collected on it.

    Without ``app.judgements``: ``collect.html`` and ``pairs.parquet`` beside the page. With files, or with
    ``app.simulated`` judges: ``agreement.parquet``. ``latents.parquet`` holds the scores. Raises what
    ``read_judgements``, ``latent_scores`` and ``draw_pairs`` raise.
    """
    options, split, seed = cfg.app, cfg.split, int(cfg.seed)
    opened = {one.name: one for one in runs}
    if options.judgements is not None and options.simulated:
        raise ValueError("Both app.judgements and app.simulated are set; people and made-up judges are not mixed.")
    files = _files(options.judgements)
    d_sae = {name: one.sae.d_sae for name, one in opened.items()}
    judgements = read_judgements(files, d_sae) if files else None  # before anything slow
    judge = SimilarityEncoder(None if options.judge is None else OmegaConf.to_container(options.judge, resolve=False))  # type: ignore[arg-type]
    scores = pd.concat([latent_scores(one, split, judge, options.images) for one in runs], ignore_index=True)
    tables, texts = {LATENTS: scores}, {}
    sections: list[Section] = []
    if judgements is None:
        pairs = draw_pairs(scores, options.pairs, options.strata, options.images, seed)
        tables[PAIRS] = pairs
        texts[COLLECT] = collecting_page(study_of(pairs, opened, split, options.images))
        sections.append(page.collecting(pairs))
        if options.simulated:
            judgements = simulated_judgements(pairs, scores, options.simulated, seed)
            texts[MADE_UP] = judgements.to_csv(index=False)
    lead: list[str] = [page.LEAD]
    lines: list[Headline] = []
    numbers: dict[str, Any] = {"runs": list(opened)}
    if judgements is not None:
        table, bins, between = analysed(judgements, scores, list(options.bins))
        tables[TABLE] = table
        made_up = judgements["judge"].str.startswith(SIMULATED).any()
        whose = "simulated judges" if made_up else "people"
        lead += [page.SIMULATED] if made_up else []
        lines = headlines(table, whose)
        numbers |= {"agreement": _plain(table), "by_difference": _plain(bins), "raters": _plain(between)}
        sections += page.analysis(judgements, table, bins, between, whose)
    return Result("Agreement with people", lines, lead, sections, tables, texts, numbers)


def analysed(
    judgements: pd.DataFrame, scores: pd.DataFrame, bins: Sequence[float]
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, float | int]]:
    """Agreement of every score with all choices and with the majority of judges, by difference, and of the judges."""
    levels = {"choices": judgements, "majority": majority(judgements)}
    rows = [
        {"score": name, "of": level} | agreement(with_scores(table, scores, [name]), name)
        for name in SCORES
        for level, table in levels.items()
    ]
    scored = with_scores(judgements, scores, list(SCORES))
    ranges = [by_difference(scored, name, bins) for name in SCORES if name != "constant"]
    return pd.DataFrame(rows), pd.concat(ranges, ignore_index=True), raters(judgements)


def headlines(table: pd.DataFrame, whose: str) -> list[Headline]:
    """MS score and MonoScore against a constant and purity, on the majority's choice a pair, which are independent."""
    at = table[table["of"] == "majority"].set_index("score")
    lines = []
    for name in ("ms", "monoscore"):
        ours = at.loc[name]
        for rival in ("constant", "purity"):
            what = f"{SCORES[name]} agrees with {whose}"
            lines.append(Headline(what, float(ours["agreement"]), float(at.loc[rival, "agreement"]), SCORES[rival],
                                  (float(ours["low"]), float(ours["high"]))))  # fmt: skip
    return lines


def _files(judgements: object) -> list[str]:
    """``a.csv``, ``a.csv,b.csv`` or a list of them."""
    if judgements is None:
        return []
    several = judgements.split(",") if isinstance(judgements, str) else list(judgements)  # type: ignore[call-overload]
    return [str(one).strip() for one in several]


def _plain(found: pd.DataFrame | Mapping[str, float | int]) -> Any:
    """As JSON can hold it: None for NaN."""
    if isinstance(found, pd.DataFrame):
        return [_plain(row) for row in found.to_dict("records")]
    return {key: None if isinstance(value, float) and np.isnan(value) else value for key, value in found.items()}
