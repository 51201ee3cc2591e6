"""Tables of ViSAEBench: one line an SAE, grouped by backbone, the best marked: pure functions of the runs' rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import pandas as pd

from sae_lightning.metrics.part import HEADLINES, Headline, fits, headline
from sae_lightning.rendering.table import NOTHING, Group, Head, Table, Unknown, number
from sae_lightning.runs.scores import read_rows

NAN = float("nan")

CORE = "core"  # the part that every evaluated run has

IDENTITY = ("data", "backbone", "features", "layer", "variant", "expansion", "k", "seed")


@dataclass(frozen=True, eq=False)
class Scored:
    """A ``run`` of the page with its ``rows``, those of the split that the page shows."""

    run: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @cached_property
    def values(self) -> dict[tuple[str, str], float]:
        """Values by metric and setting, with the number of dead latents."""
        values = {(row["metric"], row["setting"]): row["value"] for row in self.rows}
        return {("dead", ""): self.run["cfg"]["d_sae"] - values.get(("alive", ""), NAN)} | values

    def value(self, metric: str, setting: str = "") -> float:
        """One value; NaN where there is none."""
        return self.values.get((metric, setting), NAN)

    def why(self, metric: str, setting: str = "") -> str:
        """Why a value is NaN; nothing where there is no such row."""
        same = (r for r in self.rows if r["metric"] == metric and fits(r["setting"], setting))
        return next((r.get("why") or "" for r in same if not math.isfinite(r["value"])), "")

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """(budget, value) of a metric whose settings are one number each, such as ``k=128``, ascending; all is inf."""
        points = [(s.rpartition("=")[2], v) for (name, s), v in self.values.items() if name == metric and s]
        return sorted((math.inf if budget == "all" else float(budget), value) for budget, value in points)

    @property
    def backbone(self) -> str:
        """The features that it is of: the title of its group."""
        return f"{self.run['cfg']['backbone']} {self.run['features']}".strip()

    @property
    def kind(self) -> str:
        """Its variant, and MonoLoss where it was trained with it."""
        weight = self.run["weight"]
        return str(self.run["cfg"]["variant"]) + (f" + MonoLoss {weight:g}" if weight else "")

    @property
    def label(self) -> str:
        """What tells it apart within its group."""
        return str(self.run["label"]).split(" · ", 1)[-1]


@dataclass(frozen=True)
class Column:
    """A column of a table: a metric in a setting, over that of ``per`` where given, as text of the ``form``.

    ``better`` says whether more is better (None marks no best value), ``over`` is a heading above several columns,
    ``about`` a tooltip.
    """

    title: str
    metric: str
    setting: str = ""
    better: bool | None = None
    form: str = ".3f"
    over: str = ""
    about: str = ""
    per: str = ""

    def value(self, sae: Scored) -> float:
        """What an SAE has here; NaN where there is nothing."""
        if self.setting.endswith("*"):
            return headline(sae.rows, Headline(self.title, self.metric, self.setting))
        whole = sae.value(self.per) if self.per else 1.0
        return sae.value(self.metric, self.setting) / whole if whole else NAN

    def text(self, sae: Scored) -> str:
        """The same as text, – where there is nothing."""
        return number(self.value(sae), self.form)

    @property
    def head(self) -> Head:
        """How tables show it."""
        return Head(self.title, self.form, self.better, self.over, about=self.about)


MEANINGS = (
    "mean Moran's I of the evaluable latents: how connected the regions are on which they fire",
    "share of the features' variance that the reconstruction misses",
    "accuracy of the raw features' linear probe on the reconstruction, over its accuracy on the raw features",
    "area under the ROC curve, mean over classes, of probes that see the 128 latents of the largest F",
    "likeness of a latent's top images to another encoder: 0 as random images, 1 identical",
    "accuracy of probes of the reconstruction, over that of probes of the raw features; mean over other data sets",
    "share of tasks, a class against its siblings, that one latent does not solve and four do",
)

MAIN = [
    *(
        Column(h.title, h.metric, h.setting, h.better, about=about)
        for h, about in zip(HEADLINES, MEANINGS, strict=True)
    ),
    Column("L0", "l0", form=".1f", about="active latents a token"),
    Column("dead", "dead_share", better=False, form=".1%", about="share of latents that never fire"),
]


def scored_runs(runs: Sequence[Mapping[str, Any]]) -> list[Scored]:
    """The runs that have more than core scores, those of one backbone together, by variant, expansion, k and seed."""
    tables = [read_rows(run["folder"], strict=True) for run in runs]
    found = [
        Scored(run, [row for row in rows if row["split"] == run["split"]])
        for run, rows in zip(runs, tables, strict=True)
    ]
    found = [sae for sae in found if any(row["part"] != CORE for row in sae.rows)]
    backbones = list(dict.fromkeys(sae.backbone for sae in found))

    def place(sae: Scored) -> tuple[Any, ...]:
        cfg = sae.run["cfg"]
        settings = (cfg["variant"], sae.run["weight"], cfg["expansion"], cfg["k"] or 0, cfg["seed"])
        return (backbones.index(sae.backbone), *settings)

    return sorted(found, key=place)


def by_backbone(saes: Sequence[Scored]) -> dict[str, list[Scored]]:
    """SAEs, sorted by backbone, by the features that they are of."""
    return {title: list(members) for title, members in groupby(saes, lambda sae: sae.backbone)}


def table(saes: Sequence[Scored], columns: Sequence[Column], colours: Mapping[str, str], notes: bool = False) -> Table:
    """A line an SAE, grouped by backbone, with what each one's features give where ``notes`` are asked for."""

    def cell(sae: Scored, column: Column) -> Any:
        value = column.value(sae)
        return value if math.isfinite(value) else Unknown(sae.why(column.metric, column.setting))

    groups = [Group(title, len(members), colours.get(title, ""), raw_note(members) if notes else "")
              for title, members in by_backbone(saes).items()]  # fmt: skip
    rows = [[sae.label, *(cell(sae, column) for column in columns)] for sae in saes]
    return Table("", "", [Head("SAE"), *(column.head for column in columns)], rows, groups=groups, of="features")


def raw_note(saes: Sequence[Scored]) -> str:
    """What the features of one backbone give without an SAE, and how much of their spatial order its ``saes`` keep."""
    raw, null = (_first(saes, metric) for metric in ("channel_moran", "channel_moran_null"))
    kept = [share for sae in saes if math.isfinite(share := Column("", "moran", per="channel_moran").value(sae))]
    ends = dict.fromkeys(number(end, ".2f") for end in (min(kept, default=NAN), max(kept, default=NAN)))
    parts = [
        ("Moran's I of the channels {} (null {})", (number(raw), number(null))),
        ("M1 is {} of that", ("–".join(ends),)),
        ("linear probe {}", (number(_first(saes, "accuracy_raw"), ".1%"),)),
        ("R@1 {}", (number(_first(saes, "retrieval_raw", "k=1"), ".1%"),)),
    ]
    return " · ".join(text.format(*numbers) for text, numbers in parts if numbers[0] != NOTHING)


def _first(saes: Sequence[Scored], metric: str, setting: str = "") -> float:
    """The value of a metric that all SAEs of a backbone share."""
    return next((v for sae in saes if math.isfinite(v := sae.value(metric, setting))), NAN)


def scores_csv(saes: Sequence[Scored]) -> str:
    """All rows of all SAEs with unrounded values; an empty cell where there is no number."""
    rows = [
        {"run": sae.run["name"], **{name: sae.run["cfg"].get(name) for name in IDENTITY}, "monoloss": sae.run["weight"],
         **{name: row[name] for name in ("part", "split", "metric", "setting")},
         "value": row["value"] if math.isfinite(row["value"]) else None}
        for sae in saes for row in sae.rows
    ]  # fmt: skip
    return str(pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n"))


INPUTS = ("raw", "reconstruction", "codes")


@dataclass(frozen=True)
class Topic:
    """A table of details."""

    title: str
    about: str
    columns: list[Column]


def topics(saes: Sequence[Scored]) -> list[Topic]:
    """The tables of details, of columns in which some SAE has a value."""
    made = [_moran(), _preservation(), _probing(saes), _monosemanticity(), _cross_domain(saes), _absorption(saes),
            _downstream(saes), _msae(), _stability()]  # fmt: skip
    filled = [
        Topic(t.title, t.about, [c for c in t.columns if any(c.text(sae) != NOTHING for sae in saes)]) for t in made
    ]
    return [topic for topic in filled if topic.columns]


def settings(saes: Sequence[Scored], metric: str, key: str) -> list[str]:
    """The values that ``key`` takes in the metric's settings, numbers ascending, others in their order."""
    found = [part[len(key) + 1 :] for sae in saes for name, setting in sae.values if name == metric
             for part in setting.split(",") if part.startswith(key + "=")]  # fmt: skip
    distinct = list(dict.fromkeys(found))
    numbers = all(text.replace(".", "", 1).isdigit() for text in distinct)
    return sorted(distinct, key=float) if numbers else distinct


def _moran() -> Topic:
    return Topic("M1: Moran's I", "Of each evaluable latent the mean over images; quartiles are those of latents.", [
        Column("mean", "moran", better=True), Column("lower quartile", "moran_q25"), Column("median", "moran_median"),
        Column("upper quartile", "moran_q75"), Column("evaluable", "moran_evaluable", form=".1%"),
        Column("null", "moran_null", form=".4f", about="-1 / (P - 1), the expectation without spatial order"),
        Column("z", "moran_z", form=".1f", about="standard errors between the mean and the null"),
        Column("mean", "channel_moran", over="the features' own channels"),
        Column("median", "channel_moran_median", over="the features' own channels"),
        Column("z", "channel_moran_z", form=".1f", over="the features' own channels"),
        Column("M1 / theirs", "moran", per="channel_moran", over="the features' own channels"),
    ])  # fmt: skip


def _preservation() -> Topic:
    own = "probes of their own"
    return Topic("M3: preservation", "One linear probe, fitted on raw features, reads the reconstructions of images "
                 "held out; the codes have a probe of their own. LP-KL is in nats.", [
        Column("raw", "accuracy_raw", form=".1%", over="accuracy"),
        Column("reconstruction", "accuracy_reconstruction", form=".1%", over="accuracy"),
        Column("preservation", "preservation", better=True),
        Column("LP-KL", "lp_kl", better=False), Column("LP-Acc", "lp_accuracy", better=True),
        Column("codes", "accuracy_codes", form=".1%", over=own),
        Column("codes / raw", "codes_lift", better=True, over=own),
        Column("reconstruction", "accuracy_reconstruction_retrained", form=".1%", over=own),
        Column("preservation", "preservation_retrained", better=True, over=own),
        Column("converged", "probes_converged", form=".0%", about="share of the solvers that converged"),
    ])  # fmt: skip


def _probing(saes: Sequence[Scored]) -> Topic:
    budgets = settings(saes, "sparse_probing_auc", "k")
    return Topic("M4: sparse probing", "By the number of latents k that a probe sees.", [
        Column(k, f"sparse_probing_{metric}", f"k={k}", True, over=title)
        for metric, title in (("auc", "AUC at k"), ("accuracy", "accuracy at k")) for k in budgets
    ])  # fmt: skip


def _monosemanticity() -> Topic:
    return Topic("M5: monosemanticity", "Mean cosine of pairs of a latent's top images to another encoder, weighted by "
                 "their activations; M5 counts from that of random images.", [
        Column("M5", "monosemanticity", better=True), Column("cosine", "monosemanticity_raw"),
        Column("of random images", "monosemanticity_baseline"),
        Column("within a class", "monosemanticity_within", over="cosine of pairs"),
        Column("between classes", "monosemanticity_between", over="cosine of pairs"),
        Column("weight within", "monosemanticity_within_mass", form=".1%", about="share of the pairs' weight"),
        Column("M5", "monosemanticity_plain", over="all pairs alike"),
        Column("cosine", "monosemanticity_plain_raw", over="all pairs alike"),
        Column("latents", "monosemanticity_scored", form=",.0f"),
    ])  # fmt: skip


def _cross_domain(saes: Sequence[Scored]) -> Topic:
    columns, metric = [], "cross_domain_"
    for name in settings(saes, "cross_domain_preservation", "data"):
        at = f"data={name}"
        columns += [
            *(Column(given, f"{metric}accuracy_{given}", at, form=".1%", over=name) for given in INPUTS),
            Column("preservation", f"{metric}preservation", at, True, over=name),
            Column("codes / raw", f"{metric}codes_lift", at, True, over=name),
            *(Column(f"AUC, k = {k}", f"{metric}sparse_probing_auc", f"{at},k={k}", True, over=name)
              for k in settings(saes, f"{metric}sparse_probing_auc", "k")),
        ]  # fmt: skip
    return Topic("M6: other data sets", "Accuracy of probes of features, reconstruction and codes, each fitted on the "
                 "train images of the data set.", columns)  # fmt: skip


def _absorption(saes: Sequence[Scored]) -> Topic:
    columns = [
        Column(f"β = {beta}", "absorption", f"alpha={alpha},beta={beta}", False, over=f"α = {alpha}")
        for alpha in settings(saes, "absorption", "alpha")
        for beta in settings(saes, "absorption", "beta")
    ]
    columns += [Column(f"k = {k}", "absorption_f1", f"k={k}", over="mean F1")
                for k in settings(saes, "absorption_f1", "k")]  # fmt: skip
    return Topic("M7: absorption", "Share of the tasks with F1(k = 1) < α and F1(k = 4) > β.",
                 [*columns, Column("tasks", "absorption_tasks", form=",.0f")])  # fmt: skip


def _downstream(saes: Sequence[Scored]) -> Topic:
    columns = []
    for metric, title in (("retrieval", "image retrieval"), ("image_to_text", "text of an image"),
                          ("text_to_image", "image of a text")):  # fmt: skip
        for k in settings(saes, f"{metric}_codes", "k"):
            over = f"{title}, R@{k}"
            columns += [Column(given, f"{metric}_{given}", f"k={k}", form=".1%", over=over) for given in INPUTS]
            columns.append(Column("codes / raw", f"{metric}_lift", f"k={k}", True, over=over))
    for name in settings(saes, "segmentation_lift", "data"):
        over = f"segmentation of {name}, mIoU"
        columns += [Column(given, "segmentation_miou", f"data={name},input={given}", form=".1%", over=over)
                    for given in INPUTS]  # fmt: skip
        columns.append(Column("codes / raw", "segmentation_lift", f"data={name}", True, over=over))
    return Topic("Downstream tasks", "What raw features, reconstructions and codes are good for.", columns)


def _msae() -> Topic:
    return Topic("Metrics of MSAE", "EVR is 1 − FVU; CKNNA whether images have the same neighbours as by features; "
                 "DO the mean cosine of pairs of decoder rows.", [
        Column("EVR", "explained_variance", better=True), Column("cosine", "cosine", better=True),
        Column("of codes", "cknna", better=True, over="CKNNA"),
        Column("of reconstruction", "cknna_reconstruction", better=True, over="CKNNA"),
        Column("signed", "decoder_orthogonality", form=".4f", over="DO"),
        Column("squared", "decoder_squared_cosine", better=False, form=".4f", over="DO"),
        Column("LP-KL", "lp_kl", better=False), Column("LP-Acc", "lp_accuracy", better=True),
        Column("L0 / d_sae", "l0_share", form=".2%"), Column("dead", "dead", better=False, form=",.0f"),
    ])  # fmt: skip


def _stability() -> Topic:
    return Topic("Stability over seeds", "Cosines of one-to-one partners among the latents of runs that differ by "
                 "seed, mean over these runs.", [
        *(Column(title, f"stability{name}{end}", better=True, over=over)
          for end, over in (("", "decoder"), ("_encoder", "encoder"))
          for title, name in (("mean", ""), ("median", "_median"), ("above 0.7", "_above_0.7"),
                              ("above 0.9", "_above_0.9"), ("nearest", "_nearest"))),
        Column("other runs", "stability_siblings", form=",.0f"),
    ])  # fmt: skip
