"""What a page of runs says first: a few computed sentences, three numbers, and one picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from sae_lightning.evaluation.by_latent import ENOUGH
from sae_lightning.metrics.part import headlines
from sae_lightning.rendering.page import Block, Cards, Heading, Number, Numbers, plural, some
from sae_lightning.rendering.table import Head, Keyed, Table, number
from sae_lightning.report.benchmark import Scored, by_backbone
from sae_lightning.report.latents import CARD, cards_of
from sae_lightning.runs.run import LATENTS
from sae_lightning.saes.artefact import read_tensors

Runs = Sequence[Mapping[str, Any]]

JUDGED = ("monosemanticity", "monoscore")  # by an encoder that may be another one for each backbone

FIRST = 3  # latents of the picture


class OfLatents(NamedTuple):
    """Means over latents that fire, and over those ``frequent`` ones that do on at least ``least`` pictures."""

    least: int
    fire: int
    frequent: int
    means: dict[str, tuple[float, float]]


def least_of(n_images: int) -> int:
    """On how many of ``n_images`` pictures a latent fires whose scores say something of it: one in a hundred."""
    return max(ENOUGH, -(-n_images // 100))


def of_latents(run: Mapping[str, Any]) -> OfLatents | None:
    """The means of a run's scores of single latents; None where its evaluation does not say on what they fire."""
    tensors = read_tensors(run["folder"] / LATENTS)[0]
    fired, least = tensors.get("images_fired"), least_of(run["n_images"])
    if fired is None:
        return None
    frequent = fired >= least
    means = {}
    for name in ("monoscore", "purity", "weighted_purity"):
        values = tensors.get(name, torch.full(fired.shape, math.nan)).double()
        known = ~values.isnan() & (tensors.get("scored", fired > 0).bool() if name == "monoscore" else fired > 0)
        means[name] = float(values[known].mean()), float(values[known & frequent].mean())
    return OfLatents(least, int((fired > 0).sum()), int(frequent.sum()), means)


def latents_table(runs: Runs) -> Table | None:
    """Two lines a run: means over all latents that fire, and over those that fire on enough pictures."""
    found = [(run, each) for run in runs if (each := of_latents(run)) is not None]
    heads = [Head("run"), Head("means over"), Head("latents", ".0f"), Head("of d_sae", ".0%"), Head("MonoScore"),
             Head("purity"), Head("weighted purity")]  # fmt: skip
    rows = [
        [Keyed(run["label"], run["colour"]), over, count, count / run["cfg"]["d_sae"],
         *(mean[at] for mean in each.means.values())]
        for run, each in found
        for at, over, count in ((0, "latents that fire", each.fire),
                                (1, f"of latents on ≥ {each.least} pictures", each.frequent))
    ]  # fmt: skip
    note = "A latent that fires on a few pictures is easily pure; those on enough pictures are the ones to compare."
    return Table("", "Means over latents", heads, rows, note) if rows else None


def span(values: Iterable[float], form: str) -> str:
    """``0.61 to 0.74``, or one number where both ends read the same; – without any."""
    known = [value for value in values if math.isfinite(value)]
    return " to ".join(dict.fromkeys(number(end, form) for end in (min(known), max(known)))) if known else "–"


def first_screen(runs: Runs, saes: Sequence[Scored]) -> list[Block]:
    """The result of evaluated ``runs``, those with M1–M7 as ``saes``: sentences, numbers, and the purest latents."""
    variance = span((run["metrics"]["explained_variance"] for run in runs), ".0%")
    l0, widths = (
        span((run["metrics"]["l0"] for run in runs), ".0f"),
        span((run["cfg"]["d_sae"] for run in runs), ",.0f"),
    )
    backbones = list(dict.fromkeys(run["cfg"]["backbone"] for run in runs))
    said = [f"{plural(len(runs), 'sparse autoencoder')} on {some(backbones, 5)} keep {variance} of the features' "
            f"variance with {l0} of {widths} latents active at a time."]  # fmt: skip
    numbers = [Number(variance, "of the features' variance kept"), Number(l0, "latents active at a time")]
    known = [(run, each) for run in runs if (each := of_latents(run)) is not None]
    if known:
        single = [each for _, each in known]
        purities = span((each.means["purity"][1] for each in single), ".0%")
        share = span((each.frequent / run["cfg"]["d_sae"] for run, each in known), ".0%")
        of = f"{single[0].least} of {runs[0]['n_images']:,} {runs[0]['split']} pictures"
        said.append(f"{share} of a dictionary's latents fire on at least {of}; of the pictures that such a latent "
                    f"fires on, {purities} are of its most frequent class.")  # fmt: skip
        numbers.append(Number(purities, f"mean class purity of latents on ≥ {single[0].least} pictures"))
    else:
        numbers.append(Number(span((run["metrics"]["dead_share"] for run in runs), ".0%"), "of latents never fire"))
    said += [sentence for sentence in (leaders(saes), judges(runs)) if sentence]
    return [*said, Numbers(numbers[:3]), *pictured(runs)]


def leaders(saes: Sequence[Scored]) -> str:
    """Which features' SAEs have the highest mean of each measure that compares between backbones; "" for one."""
    groups = by_backbone(saes)
    if len(groups) < 2:
        return ""
    found: dict[str, list[str]] = {}
    for column in headlines():
        if column.metric in JUDGED:
            continue
        means = {title: sum(values) / len(values) for title, own in groups.items()
                 if (values := [v for sae in own if math.isfinite(v := sae.of(column))])}  # fmt: skip
        if len(means) > 1 and len({number(mean) for mean in means.values()}) > 1:
            first = (max if column.head.better else min)(means, key=lambda title: means[title])
            found.setdefault(first, []).append(f"{column.head.title.split()[0]} ({number(means[first])})")
    said = "; ".join(f"{title} {', '.join(measures)}" for title, measures in found.items())
    return f"First by the mean of its SAEs: {said}. M5 is judged on each backbone's own scale." if said else ""


def judges(runs: Runs) -> str:
    """How far MonoScores lie above those of random pictures, which compares where judges differ, as they do not."""
    judged = {run["similarity"]["title"] for run in runs}
    lifts = span((run["metrics"]["monoscore_scored"] - run["similarity"]["baseline"] for run in runs), "+.2f")
    scales = f"; their {len(judged)} judges have different scales" if len(judged) > 1 else ""
    return f"MonoScores less those of random pictures: {lifts}{scales}."


def pictured(runs: Runs) -> list[Block]:
    """The first latents of the first group that some run has: the purest, where latents fire on enough images."""
    for run, group in ((each, group) for each in runs for group in each["groups"] if group["cards"]):
        about = f"of {run['label']}; the strongest pictures of each, outlined where it fires. {group['about']}"
        return [Heading(group["title"], about), Cards(cards_of({**group, "cards": group["cards"][:FIRST]}), least=CARD)]
    return []
