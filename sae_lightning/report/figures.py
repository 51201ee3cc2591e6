"""The report's figures as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter

from sae_lightning.analysis.dissociation import scatter
from sae_lightning.metrics.sparsity import HISTOGRAMS
from sae_lightning.rendering.figures import COLOURS, HEADLINE_K, NULL, OTHERS, budget_axis, figure
from sae_lightning.rendering.page import Key
from sae_lightning.report.benchmark import Scored
from sae_lightning.runs.run import LATENTS
from sae_lightning.saes.artefact import read_tensors, tensor_names


def read_history(run: Path) -> pd.DataFrame:
    """``history.csv`` of a run by step, NaN where a cell is empty; without columns when there is none."""
    path = run / "history.csv"
    if not path.is_file():
        return pd.DataFrame()
    return pd.read_csv(path, index_col="step", float_precision="round_trip").drop(columns="epoch", errors="ignore")


PANELS = {
    "train/explained_variance": "explained variance",
    "train/l0": "L0",
    "train/dead_share": "dead share",
    "loss/reconstruction": "reconstruction loss",
}


def training_curves(runs: Sequence[Mapping[str, Any]]) -> str:
    """Small multiples of the training curves, one line a run, SVG."""
    with figure(11, 2.7, 1, len(PANELS)) as drawing:
        axes = drawing.axes[0]
        for i, run in enumerate(runs):
            curves = read_history(run["folder"])
            for axis, column in zip(axes, PANELS, strict=True):
                if column in curves:
                    curve = curves[column].dropna()
                    axis.plot(curve.index, curve, color=COLOURS[i % len(COLOURS)], lw=1.2, label=run["label"])
        for axis, title in zip(axes, PANELS.values(), strict=True):
            axis.set_title(title, loc="left", fontsize=9)
            axis.set_xlabel("step")
        axes[0].set_ylim(top=1.0)
        axes[1].set_ylim(0, 1.15 * axes[1].get_ylim()[1])
        axes[2].set_ylim(0, max(0.05, axes[2].get_ylim()[1]))
    return drawing.svg


def tradeoff(runs: Sequence[Mapping[str, Any]]) -> str:
    """Explained variance against L0, one mark a run, SVG."""
    with figure(5.2, 3.1) as drawing:
        axis = drawing.axis
        for i, run in enumerate(runs):
            m = run["metrics"]
            axis.scatter(m["l0"], m["explained_variance"], s=34, color=COLOURS[i % len(COLOURS)])
        axis.set_xlim(0, 1.15 * max(run["metrics"]["l0"] for run in runs))
        axis.set_xlabel("L0 (active latents a token)")
        axis.set_ylabel("explained variance (test)")
    return drawing.svg


DASHES = ((), (5, 2), (1, 1.5), (6, 2, 1, 2))  # of expansions, the largest first

MARKS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖"}  # of kinds of SAE


@dataclass(frozen=True)
class Encoding:
    """``colours`` by backbone, or by kind of SAE where all are on one; dashes by expansion, the deeper the larger k.

    ``kinds`` are told apart by marks where colours are the backbones'; all in the order of the page.
    """

    colours: dict[str, str]
    backbones: list[str]
    kinds: list[str]
    expansions: list[float]
    ks: list[float]

    @property
    def _by_kind(self) -> bool:
        return len(self.backbones) == 1 and len(self.kinds) > 1

    def key(self, sae: Scored) -> str:
        """What the colour of an SAE stands for: its backbone, or its kind."""
        return sae.kind if self._by_kind else sae.backbone

    def groups(self, saes: Iterable[Scored]) -> dict[str, list[Scored]]:
        """SAEs by what their colour stands for."""
        found: dict[str, list[Scored]] = {}
        for sae in saes:
            found.setdefault(self.key(sae), []).append(sae)
        return found

    def line(self, sae: Scored) -> dict[str, Any]:
        """How a line of an SAE is drawn."""
        dashes = DASHES[self.expansions[::-1].index(sae.run["cfg"]["expansion"]) % len(DASHES)]
        return {
            "color": self.colours[self.key(sae)], "alpha": self._depth(sae), "ls": (0, dashes) if dashes else "-",
        }  # fmt: skip

    def mark(self, sae: Scored) -> dict[str, Any]:
        """How a point of an SAE is drawn."""
        marker = "o" if self._by_kind else list(MARKS)[self.kinds.index(sae.kind) % len(MARKS)]
        return {"color": self.colours[self.key(sae)], "alpha": self._depth(sae), "marker": marker}

    def _depth(self, sae: Scored) -> float:
        k = sae.run["cfg"]["k"]
        return 1.0 if k not in self.ks or len(self.ks) < 2 else 0.4 + 0.6 * self.ks.index(k) / (len(self.ks) - 1)

    def legend(self) -> Key:
        """What the page says of colours, dashes, marks and depth; only what differs."""
        dashes = [(f"×{e:g}", " ".join(map(str, DASHES[i % len(DASHES)]))) for i, e in enumerate(self.expansions[::-1])]
        marks = [f"{list(MARKS.values())[i % len(MARKS)]} {kind}" for i, kind in enumerate(self.kinds)]
        told = [*(marks if len(marks) > 1 and not self._by_kind else [])]
        told += [f"from faint to deep: k {', '.join(f'{k:g}' for k in self.ks)}"] if len(self.ks) > 1 else []
        return Key(list(self.colours.items()), dashes[::-1] if len(dashes) > 1 else [], told)

    def of_backbones(self) -> dict[str, str]:
        """Colours by backbone; none where colours stand for something else."""
        return {} if self._by_kind else self.colours


def encoding(saes: Sequence[Scored]) -> Encoding:
    """The encoding of all figures of these SAEs."""
    backbones, kinds = (list(dict.fromkeys(of)) for of in zip(*((sae.backbone, sae.kind) for sae in saes), strict=True))
    coloured = kinds if len(backbones) == 1 and len(kinds) > 1 else backbones
    colours = {title: COLOURS[i % len(COLOURS)] for i, title in enumerate(coloured)}
    settings = [sae.run["cfg"] for sae in saes]
    ks = sorted({cfg["k"] for cfg in settings if cfg["k"] is not None})
    return Encoding(colours, backbones, kinds, sorted({cfg["expansion"] for cfg in settings}), ks)


MANY = 12  # lines in one panel, from which they are drawn thin

BINS = 30


def probing(saes: Sequence[Scored], of: Encoding) -> list[str]:
    """Accuracy over the number of latents [ViSAEBench Fig. 6]: means of all colours, then each one's SAEs."""
    metric = "sparse_probing_accuracy"
    saes = [sae for sae in saes if sae.curve(metric)]
    if not saes:
        return []
    groups = of.groups(saes)
    means = {title: _mean([sae.curve(metric) for sae in members]) for title, members in groups.items()}
    values = [v for sae in saes for _, v in sae.curve(metric) if math.isfinite(v)] or [0.0, 1.0]
    limits = (min(values) - 0.02, max(values) + 0.02)

    drawn = []
    for shown in ([""] if len(groups) > 1 else []) + list(groups):  # the first: means of all
        with figure(3.7, 2.5, title=shown or "means") as drawing:
            axis = drawing.axis
            for title, curve in means.items():
                look: dict[str, Any] = {"color": OTHERS, "lw": 0.9, "zorder": 1}
                if title != shown:
                    axis.plot(*zip(*curve, strict=True), **look if shown else {"color": of.colours[title], "lw": 1.6})
            for sae in groups.get(shown, ()):
                axis.plot(*zip(*sae.curve(metric), strict=True), lw=1.4, **of.line(sae))
                point = dict(sae.curve(metric)).get(HEADLINE_K, math.nan)
                axis.scatter(HEADLINE_K, point, s=22, zorder=3, **of.mark(sae))
            axis.axvline(HEADLINE_K, color=NULL, lw=0.9, ls=":")
            budget_axis(axis, [k for k, _ in saes[0].curve(metric)])
            axis.set_ylim(limits)
            axis.set_xlabel("latents k")
            axis.set_ylabel("accuracy")
        drawn.append(drawing.svg)
    return drawn


def moran(saes: Sequence[Scored], of: Encoding) -> str:
    """Moran's I of the evaluable latents by colour, one line a run [ViSAEBench Fig. 1b]; empty without any."""
    found = {sae: scores for sae in saes if len(scores := morans(sae))}
    groups = of.groups(found)
    if not groups:
        return ""
    marks = [sae.value(metric) for sae in found for metric in ("moran_null", "channel_moran")]
    known = np.concatenate([*found.values(), [mark for mark in marks if math.isfinite(mark)]])
    edges = np.linspace(known.min() - 0.02, known.max() + 0.02, BINS + 1)

    with figure(5.6, 0.8 + 0.62 * len(groups)) as drawing:
        axis = drawing.axis
        for y, members in enumerate(reversed(groups.values())):
            shares = [np.histogram(found[sae], edges)[0] / len(found[sae]) for sae in members]
            top = max(share.max() for share in shares)
            for sae, share in zip(members, shares, strict=True):
                style = of.line(sae)
                axis.stairs(y + 0.8 * share / top, edges, baseline=y, fill=True, color=style["color"],
                            alpha=0.3 / len(members))  # fmt: skip
                axis.stairs(y + 0.8 * share / top, edges, baseline=y, lw=1.1, **style)
                axis.plot([sae.value("moran")] * 2, [y, y + 0.13], color=style["color"], lw=2, solid_capstyle="butt")
            axis.plot([members[0].value("moran_null")] * 2, [y, y + 0.9], color=NULL, lw=1, ls=":")
            axis.plot(members[0].value("channel_moran"), y + 0.09, "v", color="#fff", mec=NULL, ms=6, clip_on=False)
        axis.set_yticks(range(len(groups)), [_tick(title, members) for title, members in reversed(groups.items())])
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.grid(False, axis="y")
        axis.set_ylim(-0.05, len(groups))
        axis.set_xlabel("Moran's I of a latent")
    return drawing.svg


def _tick(title: str, saes: Sequence[Scored]) -> str:
    shares = [100 * share for sae in saes if math.isfinite(share := sae.value("moran_evaluable"))]
    ends = dict.fromkeys(f"{end:.0f}" for end in (min(shares), max(shares))) if shares else {}
    return title + (f"\n{'–'.join(ends)} % evaluable" if ends else "")


def morans(sae: Scored) -> np.ndarray:
    """Moran's I of the evaluable latents of a run, float64; empty where it was not computed."""
    path = sae.run["folder"] / LATENTS
    if "moran" not in tensor_names(path):
        return np.empty(0)
    scores = read_tensors(path)[0]["moran"].numpy()
    return scores[~np.isnan(scores)]


def monosemanticity(saes: Sequence[Scored], of: Encoding) -> str:
    """Cosines of top images, of all pairs, within and between classes, with that of random images; SVG or empty."""
    groups = of.groups([sae for sae in saes if math.isfinite(sae.value("monosemanticity_raw"))])
    if not groups:
        return ""

    with figure(5.6, 0.8 + 0.62 * len(groups)) as drawing:
        axis = drawing.axis
        for y, (title, members) in enumerate(reversed(groups.items())):
            places = y + np.linspace(-0.26, 0.26, len(members) + 2)[1:-1][::-1]
            for place, sae in zip(places, members, strict=True):
                low, mean, high = (sae.value(f"monosemanticity_{name}") for name in ("between", "raw", "within"))
                axis.plot([low, high], [place] * 2, color=of.colours[title], lw=1, alpha=0.5)
                axis.scatter(low, place, s=20, marker="|", lw=1.4, color=of.colours[title])
                axis.scatter(high, place, s=14, color="#fff", edgecolor=of.colours[title], zorder=3)
                axis.scatter(mean, place, s=22, zorder=3, **of.mark(sae))
            floor = members[0].value("monosemanticity_baseline")
            axis.plot([floor] * 2, [y - 0.38, y + 0.38], color=NULL, lw=1, ls=":")
        axis.set_yticks(range(len(groups)), list(reversed(groups)))
        axis.tick_params(axis="y", length=0)
        axis.set_ylim(-0.5, len(groups) - 0.5)
        axis.grid(False, axis="y")
        axis.set_xlabel("cosine of a latent's top images")
    return drawing.svg


def dissociation(saes: Sequence[Scored], of: Encoding) -> str:
    """Preservation against FVU, one mark an SAE [ViSAEBench Fig. 2a]; empty where there is none."""
    marks = [(sae.value("fvu"), sae.value("preservation"), {"s": 34, **of.mark(sae)}) for sae in saes]
    known = [mark for mark in marks if math.isfinite(mark[0] + mark[1])]
    return scatter(known, (3.7, 2.5)) if known else ""


def recovery(saes: Sequence[Scored], of: Encoding) -> list[str]:
    """FVU and CKNNA by the number of a token's strongest latents that are used, one line a run."""
    drawn = []
    for metric, title in (("recovery_fvu", "FVU of a recovery"), ("recovery_cknna", "CKNNA of a recovery")):
        shown = {sae: curve for sae in saes if (curve := sae.curve(metric))}
        if not shown:
            continue
        with figure(3.7, 2.5, title=title) as drawing:
            for sae, curve in shown.items():
                finite = [(n, v) for n, v in curve if math.isfinite(n)]
                drawing.axis.plot(*zip(*finite, strict=True), lw=1.4 if len(shown) <= MANY else 0.8, **of.line(sae))
            budgets = sorted({n for curve in shown.values() for n, _ in curve if math.isfinite(n)})
            budget_axis(drawing.axis, budgets)
            drawing.axis.set_ylim(bottom=0)
            drawing.axis.set_xlabel("strongest latents of a token")
        drawn.append(drawing.svg)
    return drawn


def histograms(saes: Sequence[Scored], of: Encoding) -> list[str]:
    """How large activations are, how large each token's largest, and how often latents fire [MSAE App. F.3]."""
    read = {sae: read_tensors(path)[0] for sae in saes if (path := sae.run["folder"] / HISTOGRAMS).is_file()}
    kinds = (
        ("values", "activation", 10, "activations"),
        ("maxima", "activation", 10, "largest of each token"),
        ("frequencies", "share of tokens on which it fires", 5, "latents"),
    )
    drawn = []
    for name, label, per_decade, title in kinds if read else ():
        with figure(3.7, 2.5, title=title) as drawing:
            axis = drawing.axis
            for sae, t in read.items():
                edges, shares = coarse(t[f"{name}.edges"].numpy(), t[f"{name}.counts"].numpy(), per_decade)
                axis.stairs(shares, edges, lw=1.2 if len(read) <= MANY else 0.7, **of.line(sae))
            axis.set_xscale("log")
            wide = np.diff(np.log10(axis.get_xlim())) > 2
            axis.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_ylim(bottom=0)
            axis.set_xlabel(label)
            axis.set_ylabel("share")
        drawn.append(drawing.svg)
    return drawn


def coarse(edges: np.ndarray, counts: np.ndarray, per_decade: int) -> tuple[np.ndarray, np.ndarray]:
    """Shares [m] of ``counts`` [b + 2] between m + 1 of ``edges`` [b + 1]: edges and shares, none empty at the ends.

    Neighbouring bins are joined to ``per_decade`` where that many divide them. What lies outside counts as the rest.
    """
    joined, rest = divmod(round(1 / math.log10(edges[1] / edges[0])), per_decade)
    inner = counts[1:-1]
    if not rest and joined and len(inner) % joined == 0:
        inner, edges = inner.reshape(-1, joined).sum(1), edges[::joined]
    filled = np.flatnonzero(inner)
    first, last = (filled[0], filled[-1] + 1) if len(filled) else (0, len(inner))
    return edges[first : last + 1], inner[first:last] / max(1, counts.sum())


def _mean(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean of curves at the budgets that all of them have."""
    found = [dict(curve) for curve in curves]
    return [(k, float(np.mean([curve[k] for curve in found]))) for k in found[0] if all(k in curve for curve in found)]
