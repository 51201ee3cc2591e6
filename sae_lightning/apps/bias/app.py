"""Bias: what a linear classifier on the encoder's features has learnt, told by latents [MSAE §5.3, App. G.3].

A latent's direct effect on the decision, how its magnitude goes with predicted and true classes, dose-response curves
of forcing it, and a check with a known answer: the same on a classifier with a bias planted into its training pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from sae_lightning.apps.app import app
from sae_lightning.apps.bias import page
from sae_lightning.apps.bias.dose import pushes
from sae_lightning.apps.bias.planted import Check, check, versions
from sae_lightning.apps.bias.study import Members, Study, Task, batches, labelled, mean_of, members, study, task_of
from sae_lightning.apps.edits import WholeImages, whole_images
from sae_lightning.apps.names import names_of
from sae_lightning.backbones.backbone import BackboneError
from sae_lightning.data import DataError
from sae_lightning.features.source import plain
from sae_lightning.runs.results import Headline, Result
from sae_lightning.runs.run import Run

TABLE = "bias.parquet"
RANDOM = 50  # latents that the drawn ones are compared with


@app("bias")
def run(runs: Sequence[Run], cfg: DictConfig) -> Result:
    """Explain the classifier of ``cfg.app``'s task on images of ``cfg.split``.

    ValueError for features of captions, for the split that the classifier is trained on, and for a task that does not
    fit the data; DataError for an attribute that is not there.
    """
    (opened,), options = runs, cfg.app
    if opened.cfg["features"] == "text":
        raise ValueError(
            f"{opened.name} was trained on captions, but a classifier of images is explained; train on "
            "features=embedding, pooled, cls or patch."
        )
    if cfg.split == "train":
        raise ValueError("The classifier is trained on the split train, so it is explained on another; set split=test.")
    task, held = _task(opened, cfg.split, options)
    _, fitted = _task(opened, "train", options)
    images = whole_images(opened.sae, batches(opened.store(cfg.split), held.rows))
    found = study(
        opened.features("train")[fitted.rows], fitted.truth, images, held.truth, opened.sae, options.strength, cfg.seed
    )
    planted, why_not = _planted(opened, cfg, fitted, held)
    names = names_of(opened)
    tables = {TABLE: named(found.table, names)}
    chosen = _chosen(options, found)
    base = found.logits if options.keep_error else found.classifier.logits(images.decoded)
    headlines, numbers = _headlines(found, images, base, chosen, planted, options.plant.attribute, cfg.seed)
    if planted is not None:
        tables["planted.parquet"] = named(_both(planted), names)
    pictures = page.Pictures.of(opened, cfg.split, held.rows)
    sections = [
        page.doses(found, images, base, chosen, options.reach, task, names, pictures),
        page.latents(found, images, names, pictures, options.rows),
        page.known_bias(planted, why_not, names, pictures, options.plant, task),
    ]
    title = f"Bias of a classifier: {task.title[0]} against {task.title[1]}"
    lead = page.lead(len(fitted.truth), len(held.truth), cfg.split, task)
    return Result(title, headlines, [lead], sections, tables, numbers=numbers)


def _task(opened: Run, split: str, options: DictConfig) -> tuple[Task, Members]:
    labels, classes, siblings = labelled(opened, split, options.attribute)
    task = task_of(classes, siblings, options.positive, options.negative)
    if options.attribute is not None and options.positive is None:
        task = task._replace(title=(options.attribute, f"not {options.attribute}"))
    return task, members(labels, classes, task)


def _planted(opened: Run, cfg: DictConfig, fitted: Members, held: Members) -> tuple[Check | None, str]:
    """The check, or None and why there is none."""
    plant = plain(cfg.app.plant)
    if plant["attribute"] is None:
        return None, "It was left out (app.plant.attribute=null)."
    other = "val" if cfg.split == "test" else "test"
    parts = {"train": fitted, cfg.split: held, other: _task(opened, other, cfg.app)[1]}
    try:
        train, there, elsewhere = (
            versions(opened, split, of, plant, cfg.device, cfg.seed) for split, of in parts.items()
        )
    except (BackboneError, DataError) as error:
        return None, f"It needs pictures and the encoder. {error}"
    rho, most, strength = plant["correlation"], plant["most"], cfg.app.strength
    return check(train, there, elsewhere, opened.sae, rho, most, strength, cfg.seed), ""


def _chosen(options: DictConfig, found: Study) -> np.ndarray:
    """The latents to draw; ValueError for one that is silent on the held-out images or does not exist."""
    if options.latents is None:
        return found.associated(options.each)
    fires = found.table["images"].to_numpy()
    wrong = [i for i in options.latents if not 0 <= i < len(fires) or not fires[i]]
    if wrong:
        raise ValueError(f"app.latents={wrong} are silent on all images of the task, or none of {len(fires)} latents.")
    return np.asarray(options.latents, dtype=np.int64)


def named(table: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """``table`` with the column ``name`` after the first."""
    table = table.copy()
    table.insert(1, "name", [names[i] for i in table["latent"]])
    return table


def _both(found: Check) -> pd.DataFrame:
    """Both studies' tables of the planted check below each other, with what tells the attribute."""
    parts = [(True, found.biased.table), (False, found.control.table)]
    tells = {f"detects{end}": each for end, each in zip(("", "_lo", "_hi"), found.detects[:3], strict=True)}
    return pd.concat([table.assign(planted=is_biased, **tells) for is_biased, table in parts], ignore_index=True)


def _headlines(
    found: Study, images: WholeImages, base: np.ndarray, chosen: np.ndarray, planted: Check | None, attribute: str,
    seed: int,
) -> tuple[list[Headline], dict[str, Any]]:  # fmt: skip
    """The figures of the page's head, and further ones for the record."""
    majority = max(found.truth.mean(), 1 - found.truth.mean())
    lines = [
        Headline("accuracy of the classifier", found.accuracy.value, float(majority), "the larger class",
                 found.accuracy[1:]),
        Headline("F1 of the classifier", found.f1.value, float(2 * found.truth.mean() / (1 + found.truth.mean())),
                 "always positive", found.f1[1:]),
    ]  # fmt: skip
    numbers: dict[str, Any] = {
        "slope": found.classifier.slope, "tested": len(found.tested), "found": len(found.found),
        "associated": int((found.table["auc_q"] < 0.05).sum()),
    }  # fmt: skip
    if len(chosen):
        rng = np.random.default_rng(seed)
        random = rng.choice(found.tested, size=min(RANDOM, len(found.tested)), replace=False)
        ours, theirs = (pushes(some, found.effects, base, images) for some in (chosen, random))
        value = mean_of(ours, seed)
        lines.append(Headline("change of probability by one forced latent, the most associated ones", value.value,
                              float(theirs.mean()), "random latents", value[1:]))  # fmt: skip
    if planted is not None:
        more, record = _planted_headlines(planted, attribute)
        lines += more
        numbers["planted"] = record
    return lines, numbers


def _planted_headlines(found: Check, attribute: str) -> tuple[list[Headline], dict[str, Any]]:
    top, control_top = (int(each.ranked[0]) for each in (found.biased, found.control))
    tells, by_chance = found.detection(top), found.detection(control_top)
    ours, theirs = (each.table.iloc[found.best] for each in (found.biased, found.control))
    lines = [
        Headline(f"planted {attribute}: how well the surest latent tells it (AUC)", tells.value, by_chance.value,
                 "the surest without a bias", (tells.lo, tells.hi)),
        Headline(f"planted {attribute}: excess of the latent that tells it best", float(ours["excess"]),
                 float(theirs["excess"]),
                 f"without a bias ({theirs['excess_lo']:.2f} to {theirs['excess_hi']:.2f})",
                 (float(ours["excess_lo"]), float(ours["excess_hi"]))),
        Headline(f"planted {attribute}: latents found", len(found.biased.found), len(found.control.found),
                 "without a bias"),
    ]  # fmt: skip
    record: dict[str, Any] = {
        "best": found.best, "detects": found.detection(found.best).value, "surest": top,
        "rank_of_best": int(np.flatnonzero(found.biased.ranked == found.best)[0]) + 1,
        "accuracy": found.biased.accuracy.value, "accuracy_control": found.control.accuracy.value,
        "found": len(found.biased.found), "found_control": len(found.control.found),
    }  # fmt: skip
    if found.mitigation is not None:
        m = found.mitigation
        lines.append(Headline(f"planted {attribute}: accuracy gained on conflicting pictures by neutralising",
                              m.gain.value, m.random_gain.value, "as many random latents", m.gain[1:]))  # fmt: skip
        record |= {"neutralised": m.latents.tolist(), "gain_over_random": list(m.over_random)}
        for kind in m.before:
            record[kind] = {"before": m.before[kind], "found": m.found[kind], "random": m.random[kind]}
    return lines, record
