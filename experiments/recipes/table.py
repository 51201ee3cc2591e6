"""The tables: every run, the means of its arm over seeds, and what becomes of each claim of the papers.

A claim is about the difference between two arms, seed by seed. RULE says when it counts as reproduced.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.recipes.plan import MONOLOSS, SETS, SPARSER, STEERED, K, Planned
from sae_lightning.rendering.table import NOTHING, Head, Spread, Table
from sae_lightning.runs.run import RESULT, SCORES
from sae_lightning.runs.scores import read_rows

METRICS = {
    "explained_variance": "expl. var.",
    "l0": "L0",
    "dead_share": "dead",
    "monoscore": "MonoScore",
    "monoscore_scored": "of scored",
    "purity": "purity",
    "weighted_purity": "weighted",
}
FORMS = {"l0": ".1f", "dead_share": ".1%"}
ARM = ["features", "recipe", "variant", "arm"]

SEEDS, ERRORS, SMALL, APART, DEAD = 3, 2.0, 0.005, 0.1, 0.01

RULE = f"""\
A claim counts as **reproduced** where at least {SEEDS} seeds are there, the difference has the claimed sign in each,
and their mean is more than {ERRORS:g} standard errors, and more than {SMALL:g}, from 0; as **the opposite** where the
same holds of the other sign; else as **not reproduced**. It is **not testable** where seeds are missing, where two arms
that should be equally sparse differ in L0 by more than {APART:.0%}, or where the ingredient has nothing to do (without
AuxK fewer than {DEAD:.0%} of the latents are dead). MonoLoss changes the L0 of JumpReLU and vanilla, and MSAE has its
own: they are compared, at their L0, with the line over log L0 through two runs of the same seed without the ingredient
(for explained variance the line of log FVU), which may lie beyond the two."""

Arm = tuple[str, str, str]  # recipe, variant, arm


@dataclass(frozen=True)
class Claim:
    """``metric`` of the arm ``ours`` is above (``sign`` 1) or below (-1) that of the arm ``other``, says ``paper``."""

    about: str
    metric: str
    sign: int
    other: Arm
    ours: Arm
    paper: str
    equal_l0: bool = True
    needs_dead: bool = False
    other_metric: str = ""
    second: Arm | None = None  # with ``other`` the ends of a line, which ours is compared with at its own L0


def _monoloss(variant: str) -> list[Claim]:
    arms: tuple[Arm, Arm] = ("MonoLoss", variant, "without"), ("MonoLoss", variant, "with")
    second = None
    if variant in STEERED:
        ends = [("MonoLoss", variant, f"without, L0 {l0}") for l0 in (K, SPARSER)]
        arms, second = (ends[0], arms[1]), ends[1]
    said = dict.fromkeys(("monoscore", "monoscore_scored"), "rises in nearly all of 24 settings")
    said["purity"] = "rises in all of 12 settings (Table 1)"
    name = f"MonoLoss on {variant}"
    return [Claim(name, m, 1, *arms, f"MonoLoss: {paper}", second is None, second=second) for m, paper in said.items()]


def _auxk(variant: str) -> list[Claim]:
    arms = ("AuxK", variant, "without"), ("AuxK", variant, "with")
    claim = (f"AuxK on {variant}", *arms)
    return [
        Claim(claim[0], "dead_share", -1, *arms, "Gao et al.: fewer dead latents", needs_dead=True),
        Claim(claim[0], "explained_variance", 1, *arms, "Gao et al.: lower error", needs_dead=True),
    ]


def _matryoshka() -> list[Claim]:
    arms = ("Matryoshka", "batchtopk", "without"), ("Matryoshka", "batchtopk", "with")
    paper = "MS score: higher at the same expansion"
    name = "Matryoshka against BatchTopK"
    return [
        *(Claim(name, metric, 1, *arms, paper) for metric in ("monoscore", "monoscore_scored", "purity")),
        Claim(name, "explained_variance", -1, *arms, "MS score: at a cost of 0.02 to 0.03 in R²"),
    ]


def _msae() -> list[Claim]:
    uniform, reverse = ("MSAE", "msae", "uniform"), ("MSAE", "msae", "reverse")
    claims = []
    for arm, name in ((uniform, "MSAE UW"), (reverse, "MSAE RW")):
        for k in (K, 4 * K):
            other = ("MSAE", "topk", f"k {k}")
            claims.append(Claim(f"{name} against TopK {k}", "explained_variance", 1, other, arm,
                                "MSAE: better fidelity than TopK (§4.2)", equal_l0=False))  # fmt: skip
            claims.append(Claim(f"{name}'s {k} strongest against TopK {k}", "explained_variance", 1, other, arm,
                                "MSAE: at least TopK's at its own k (§4.3)", equal_l0=False,
                                other_metric=f"recovered_{k}"))  # fmt: skip
        ends = [("MSAE", "relu", f"weight {weight}") for weight in (0.1, 1)]
        claims.append(Claim(f"{name} against ReLU's frontier", "explained_variance", 1, ends[0], arm,
                            "MSAE: on a better frontier than ReLU (§4.2)", equal_l0=False, second=ends[1]))  # fmt: skip
    return [
        *claims,
        Claim("MSAE RW against UW", "l0", -1, uniform, reverse, "MSAE: RW is sparser", equal_l0=False),
        Claim("MSAE RW against UW", "explained_variance", -1, uniform, reverse,
              "MSAE: at a slightly lower fidelity", equal_l0=False),
    ]  # fmt: skip


CLAIMS = [
    *(claim for variant in MONOLOSS for claim in _monoloss(variant)),
    *_matryoshka(), *_auxk("batchtopk"), *_auxk("topk"), *_msae(),
]  # fmt: skip


def collect(runs: Iterable[tuple[Planned, Path]]) -> pd.DataFrame:
    """One row a run that is trained and scored: its place in the plan, its scores on the test split, its name."""
    rows = []
    for run, folder in runs:
        if not ((folder / SCORES).is_file() and (folder / RESULT).is_file()):
            continue
        scores = json.loads((folder / SCORES).read_text(encoding="utf-8"))["metrics"]
        recovered = {
            f"recovered_{row['setting'].removeprefix('n=')}": row["value"]
            for row in read_rows(folder)
            if row["metric"] == "recovery_explained_variance" and row["setting"] != "n=all"
        }
        place = {name: getattr(run, name) for name in (*ARM, "seed")}
        seconds = json.loads((folder / RESULT).read_text(encoding="utf-8"))["seconds"]
        rows.append(place | {name: scores[name] for name in METRICS} | recovered
                    | {"seconds": round(seconds, 1), "run": folder.name})  # fmt: skip
    return pd.DataFrame(rows)


def verdict(differences: Sequence[float], sign: int) -> str:
    """What RULE says of a claim's ``differences``, one a seed, of which each should have ``sign``."""
    values = np.asarray(differences, dtype=float) * sign
    if len(values) < SEEDS:
        return f"not testable ({len(values)} of {SEEDS} seeds)"
    clear = abs(values.mean()) > max(SMALL, ERRORS * values.std(ddof=1) / math.sqrt(len(values)))
    if clear and (values > 0).all():
        return "reproduced"
    return "the opposite" if clear and (values < 0).all() else "not reproduced"


def line(metric: str, a: pd.DataFrame, b: pd.DataFrame, l0: pd.Series) -> pd.Series:
    """``metric`` at ``l0`` on the line through ``a`` and ``b`` over log L0; of explained variance that of log FVU."""
    fvu = metric == "explained_variance"
    y = [np.log1p(-arm[metric]) if fvu else arm[metric] for arm in (a, b)]
    at = y[0] + (y[1] - y[0]) * np.log(l0 / a.l0) / np.log(b.l0 / a.l0)
    return 1 - np.exp(at) if fvu else at


def judged(runs: pd.DataFrame, claim: Claim, features: str) -> tuple[Spread, str]:
    """The mean difference with its standard deviation over the seeds that both arms have, and the verdict."""
    here = runs[runs.features == features]
    wanted = [arm for arm in (claim.other, claim.ours, claim.second) if arm is not None]
    arms = [here[(here.recipe == r) & (here.variant == v) & (here.arm == a)].set_index("seed") for r, v, a in wanted]
    common = sorted(set.intersection(*(set(arm.index) for arm in arms)))
    if not common:
        return Spread(math.nan, None), ""
    without, ours, *second = (arm.loc[common] for arm in arms)
    expected = line(claim.metric, without, second[0], ours.l0) if second else without[claim.metric]
    found = (ours[claim.other_metric or claim.metric] - expected).to_numpy()
    spread = Spread(float(found.mean()), float(found.std(ddof=1)) if len(found) > 1 else None)
    sparse = without.l0.mean(), ours.l0.mean()
    if claim.equal_l0 and not (1 - APART < sparse[1] / sparse[0] < 1 + APART):
        return spread, f"not testable (L0 {sparse[0]:.1f} → {sparse[1]:.1f})"
    if claim.needs_dead and without.dead_share.mean() < DEAD:
        return spread, f"not testable ({without.dead_share.mean():.1%} dead without)".replace("%", " %")
    return spread, verdict(found.tolist(), claim.sign)


def claims(runs: pd.DataFrame) -> Table:
    """A row a claim: for each set of features the difference between the arms and the verdict."""
    rows = []
    for claim in CLAIMS:
        head = Head("", FORMS.get(claim.metric, ".3f"), sign=True)
        cells = [judged(runs, claim, features) for features in SETS]
        texts = [f"{head.text(spread)} {said}" if said else NOTHING for spread, said in cells]
        if any(said for _, said in cells):
            way = "↑" if claim.sign > 0 else "↓"
            rows.append([claim.about, f"{METRICS[claim.metric]} {way}", *texts, claim.paper])
    heads = [Head("recipe"), Head("claimed"), *map(Head, SETS), Head("the paper")]
    return Table("claims", "What becomes of the papers' claims", heads, rows)


def means(runs: pd.DataFrame) -> Table:
    """A row an arm on one set: mean and standard deviation over seeds of every metric on the test split."""
    rows = []
    for place, arm in runs.groupby(ARM, sort=False):
        spread = [Spread(float(arm[m].mean()), float(arm[m].std()) if len(arm) > 1 else None) for m in METRICS]
        rows.append([*place, len(arm), *spread])
    heads = [*map(Head, ARM), Head("seeds", ".0f"), *(Head(title, FORMS.get(m, ".3f")) for m, title in METRICS.items())]
    return Table("means", "Means over seeds", heads, rows)


def write(runs: pd.DataFrame, out: Path, starts: bool = False) -> None:
    """``runs.csv``, ``claims.csv``, ``means.csv`` and the last two as ``tables.md``; of starts ``starts.csv`` alone."""
    if runs.empty:
        raise SystemExit("Nothing is trained and scored yet; run it without --table.")
    order = {name: i for i, name in enumerate(SETS)}
    runs = runs.sort_values("features", key=lambda names: names.map(order), kind="stable")
    out.mkdir(parents=True, exist_ok=True)
    if starts:
        (out / "starts.csv").write_text(means(runs).csv(), encoding="utf-8")
        return
    runs.to_csv(out / "runs.csv", index=False, float_format="%.6g")
    tables = claims(runs), means(runs)
    for table in tables:
        (out / f"{table.name}.csv").write_text(table.csv(), encoding="utf-8")
    text = "\n".join(f"## {table.title}\n\n{table.markdown()}" for table in tables)
    (out / "tables.md").write_text(f"{text}\n## The rule\n\n{RULE}\n", encoding="utf-8")
