"""Which details of ViSAEBench and MSAE the page has: their tables' columns, as far as there are rows for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sae_lightning.report.visaebench_tables import NOTHING, Column, Scored

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
