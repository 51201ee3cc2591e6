"""The SAE put back inside its encoder: what is still recognised, and what single latents do to the rest of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from tqdm.auto import tqdm

from sae_lightning.backbones.backbone import BackboneError
from sae_lightning.backbones.natural import Natural, Report, Tally
from sae_lightning.backbones.splice import beside, fanned, masked
from sae_lightning.metrics.base import Score
from sae_lightning.metrics.intervals import averaged
from sae_lightning.metrics.part import Column, Options, Part, ScoredRun, register
from sae_lightning.metrics.readout import Sample, Study, Unknown, outputs, spans, study
from sae_lightning.saes.sae import SAE

WHOLE = ("kept", "mean", "sae", "zero")  # what all features at the SAE's place become

NATURAL = 1 << 14  # tokens that are looked at to know what is natural

NEAR = 10  # latents that fire about as often as another, of which one is drawn

SAME = 1e-5  # share of the outputs up to which nothing has changed


# --- which latents ------------------------------------------------------------------------------------------
def latents_of_classes(sae: SAE, sample: Sample, most: int, seed: int) -> dict[str, list[list[int]]]:
    """For each class its ``most`` latents of the largest mean code on its pictures, and as many others.

    These, the ``random`` ones, are drawn among latents that fire on the class's pictures where there are enough.
    """
    n, tokens, device = int(sample.labels.max()) + 1, sample.store.n_patches, sae.W_dec.device
    labels, sums = torch.from_numpy(sample.labels).to(device), torch.zeros(n * sae.d_sae, device=device)
    for span, codes in sample.codes(sae):
        own = labels[span.start : span.stop][codes.rows() // tokens]
        sums.index_add_(0, own * sae.d_sae + codes.latents, codes.values.float())
    rng, found = np.random.default_rng(seed), defaultdict(list)
    for of_class in sums.view(n, -1).cpu().numpy():
        order = np.argsort(-of_class, kind="stable")
        rest = rng.permutation(order[most:])
        found["typical"].append(order[:most].tolist())
        found["random"].append(sorted(rest.tolist(), key=lambda i: of_class[i] <= 0)[:most])
    return found


def pairs_of(codes: sparse.csr_matrix, labels: np.ndarray, options: Options) -> dict[str, list[tuple[int, int]]]:
    """(picture, latent) of the ``top`` pictures of some latents each, by name: those chosen, and ``random`` ones.

    ``codes`` [n, d_sae] pooled. Chosen are the ``purest`` (by the most common class of their top pictures; of equals
    what fires on fewer) or the most ``used``; a random one for each fires on as many pictures, or nearly. Only latents
    that fire on ``top`` pictures count.
    """
    columns, rng, top, how = codes.tocsc(), np.random.default_rng(options["seed"]), options["top"], options["choose"]
    fired, best, purity = np.diff(columns.indptr), {}, {}
    for latent in np.flatnonzero(fired >= top).tolist():
        own = slice(*columns.indptr[latent : latent + 2])
        best[latent] = columns.indices[own][np.argsort(-columns.data[own], kind="stable")[:top]]
        purity[latent] = np.bincount(labels[best[latent]]).max()
    order = sorted(best, key=lambda i: (-purity[i], fired[i]) if how == "purest" else (-fired[i], 0))
    chosen, left = order[: options["latents"]], order[options["latents"] :]
    alike: list[int] = []
    for latent in chosen[: len(left)]:
        near = sorted(left, key=lambda i: abs(int(fired[i]) - int(fired[latent])))[:NEAR]
        alike.append(int(rng.choice(near)))
        left.remove(alike[-1])
    return {
        name: [(int(i), one) for one in some for i in best[one]] for name, some in ((how, chosen), ("random", alike))
    }


# --- one pass over the pictures -----------------------------------------------------------------------------
class Change(NamedTuple):
    """What is done to a ``picture``: all its features replaced, or ``latents`` kept or ablated, as ``setting`` says."""

    picture: int
    setting: str  # features=kept (nothing), sae, mean or zero; or kept=k, removed=k or ablated=1, each with latents=…
    latents: Sequence[int] = ()


@dataclass
class Inside:
    """An SAE at its place in the encoder of a study; ``tallies`` say by setting how natural what it put there was."""

    about: Study
    sae: SAE
    layer: int
    tokens: str
    natural: Natural
    by: str
    generator: torch.Generator
    tallies: dict[str, Tally]

    def look(self, images: Tensor, changes: Sequence[Change]) -> tuple[Tensor, Tensor]:
        """Logits [n, C] of the ``changes`` of ``images``, all in one pass, and ‖Δ‖ / ‖x‖ [n, layers] of what each layer
        gives from the SAE's on. The first B change nothing, the next replace all features."""
        of, n, relative = torch.tensor([change.picture for change in changes], device=images.device), len(images), []

        def watch(layer: int, given: Tensor) -> None:
            if layer >= self.layer:
                clean = given[:n].flatten(1)
                relative.append((given.flatten(1) - clean[of]).norm(dim=1) / clean.norm(dim=1).clamp_min(1e-12)[of])

        about, title = self.about, self.about.backbone.title
        found = fanned(
            partial(outputs, about.backbone, patches=about.patches, watch=watch), about.backbone, images,
            lambda x: (of[n:], self.put(x, changes[n:])), self.sae.d_in, at=self.layer, tokens=self.tokens,
        )  # fmt: skip
        clean, replaced = found[:n], found[n : 2 * n]
        if bool((replaced - clean).abs().max() <= SAME * clean.abs().max()):
            raise Unknown(
                f"the output of {title} is the same whatever its {self.tokens} tokens at layer {self.layer} are: "
                "nothing behind reads them; choose an earlier layer, or set metrics.causal.output=patch"
            )
        return about.readout.logits(found), torch.stack(relative, 1).double().cpu()

    def put(self, x: Tensor, changes: Sequence[Change]) -> Tensor:
        """The features [n, P, d_in] of the ``changes`` of pictures with features ``x`` [B, P, d_in]."""
        flat = x.reshape(-1, self.sae.d_in).float()
        codes = self.sae.encode(flat)
        rebuilt = self.sae.decode(codes)
        whole = {"features=sae": rebuilt.reshape(x.shape), "features=zero": torch.zeros_like(x, dtype=torch.float32),
                 "features=mean": self.natural.mean.to(rebuilt).expand(x.shape)}  # fmt: skip
        made, rows = x.new_zeros(len(changes), *x.shape[1:], dtype=torch.float32), _places(changes)
        for setting, at in rows.items():
            some = [(changes[row].picture, changes[row].latents) for row in at]
            if setting in whole:
                made[at] = whole[setting][[picture for picture, _ in some]]
            else:
                keep = setting.startswith("kept")
                made[at] = masked(self.sae, x, codes, some, self.by, self.natural, self.generator, keep)
            self.tallies[setting].passed(flat, flat - rebuilt)
            self.tallies[setting].put(made[at])
        return made


def _places(changes: Sequence[Change]) -> dict[str, list[int]]:
    """Where the changes of each setting are."""
    found = defaultdict(list)
    for row, change in enumerate(changes):
        found[change.setting].append(row)
    return found


def look(
    inside: Inside, classes: Mapping[str, list[list[int]]], pairs: Mapping[str, list[tuple[int, int]]], options: Options
) -> tuple[list[Change], Tensor, Tensor]:
    """All changes of the test pictures with their logits and ‖Δ‖ / ‖x‖; Unknown where nothing reaches the output."""
    test, found = inside.about.test, []
    done: list[Change] = []
    masks = [(f"{what}={k},latents={name}", k, name)
             for what in ("kept", "removed") for k in options["budgets"] for name in classes]  # fmt: skip
    step, title = max(1, options["rows"] // (4 + len(masks))), f"{inside.about.backbone.title} with an SAE"
    for span in tqdm(spans(len(test.rows), step), title, unit="batch", leave=False):
        changes = [Change(i, f"features={name}") for name in WHOLE for i in range(len(span))]
        changes += [Change(i, setting, classes[name][test.labels[place]][:k])
                    for setting, k, name in masks for i, place in enumerate(span)]  # fmt: skip
        changes += [Change(i - span.start, f"ablated=1,latents={name}", [latent])
                    for name, some in pairs.items() for i, latent in some if i in span]  # fmt: skip
        found.append(inside.look(test.pixels(span, inside.sae.W_dec.device), changes))
        done += [change._replace(picture=change.picture + span.start) for change in changes]
    logits, relative = zip(*found, strict=True)
    return done, torch.cat(logits), torch.cat(relative)


# --- scores -------------------------------------------------------------------------------------------------
def refusal(report: Report, options: Options, fvu: float | None = None) -> str:
    """Why effects of a splice with this ``report`` are not to be told; nothing where they are."""
    try:
        report.check(options["unnatural"], options["fvu"] if fvu is None else fvu)
    except BackboneError as error:
        return f"{str(error).rstrip('.?')} (metrics.causal.unnatural and fvu are the limits)"
    return ""


FIGURES = {"features": ("accuracy", "cross_entropy"), "kept": ("accuracy",), "removed": ("accuracy",),
           "ablated": ("logit", "kl")}  # fmt: skip


def scores_of(
    changes: Sequence[Change], logits: Tensor, relative: Tensor, reports: Mapping[str, Report], labels: np.ndarray,
    layer: int, options: Options,
) -> list[Score]:  # fmt: skip
    """All rows of what ``look`` has found of pictures of classes ``labels`` [n] behind ``layer``."""
    n, rows = len(labels), _places(changes)
    drawn = {"draws": options["draws"], "seed": options["seed"]}
    pictures = np.array([change.picture for change in changes])
    of, clean = torch.from_numpy(labels[pictures])[:, None], logits[rows["features=kept"]][pictures]
    before, after = clean.log_softmax(1), logits.log_softmax(1)
    figures = {
        "accuracy": (logits.argmax(1, keepdim=True) == of)[:, 0].double(),
        "cross_entropy": -after.gather(1, of)[:, 0],
        "logit": (logits - clean).gather(1, of)[:, 0],
        "kl": (before.exp() * (before - after)).sum(1),
    }

    def total(values: Tensor, setting: str) -> np.ndarray:
        """Sums [n] over the changes of each picture."""
        return np.bincount(pictures[rows[setting]], values[rows[setting]].numpy(), n)

    entropy = {name: total(figures["cross_entropy"], f"features={name}") for name in WHOLE}
    scores = [Score("causal_pictures", n)]
    for against in ("mean", "zero"):
        won, lost = entropy[against] - entropy["sae"], entropy[against] - entropy["kept"]
        why = refusal(reports["features=sae"], options, math.inf)  # the score itself tells how much an SAE loses
        if (averaged("", lost, **drawn).low or 0) <= 0:
            why = f"features={against} cost no cross-entropy beyond chance, so that there is nothing to recover"
        scores.append(averaged("causal_recovered", won, f"against={against}", lost, n=n, why=why, **drawn))
    for setting, at in rows.items():
        what, counts = setting.split("=")[0], np.bincount(pictures[at], minlength=n)
        why = "" if what == "features" else refusal(reports[setting], options)
        for name in FIGURES[what]:
            scores.append(averaged(f"causal_{name}", total(figures[name], setting), setting, counts, why=why, **drawn))
        if what == "ablated":
            scores.append(Score("causal_pairs", len(at), setting))
            for i, values in enumerate(relative.T, start=layer):
                by_layer = f"{setting},layer={i}"
                scores.append(averaged("causal_change", total(values, setting), by_layer, counts, why=why, **drawn))
    for setting, report in reports.items():
        scores += [Score(f"causal_{name}", getattr(report, name), setting) for name in ("distance", "unnatural")]
    return [*scores, Score("causal_fvu", reports["features=sae"].fvu)]


@torch.no_grad()
def causal(run: ScoredRun, options: Options) -> list[Score]:
    """Everything above of one run; NaN with the reason where its features, pictures or encoder are not for it."""
    try:
        about = run.shared("causal", lambda: study(run, options))
        sae, train, test, layer = beside(run.sae, run.device), about.train, about.test, run.source.tap.layer
        assert layer is not None  # or study would have said that nothing lies behind
        some = train.store.features(train.rows[: max(2, NATURAL // train.store.n_patches)])
        natural = Natural(sae, some.to(run.device).float())
        tallies: dict[str, Tally] = defaultdict(lambda: Tally(natural))
        generator = torch.Generator().manual_seed(options["seed"])
        inside = Inside(about, sae, layer, run.source.features, natural, options["by"], generator, tallies)
        codes = sparse.vstack([part.pool(test.store.n_patches).csr() for _, part in test.codes(sae)]).tocsr()
        classes = latents_of_classes(sae, train, max(options["budgets"]), options["seed"])
        found = look(inside, classes, pairs_of(codes, test.labels, options), options)
    except Unknown as reason:
        return [Score("causal_recovered", math.nan, f"against={name}", str(reason)) for name in ("mean", "zero")]
    reports = {setting: tally.report() for setting, tally in tallies.items()}
    return scores_of(*found, reports, test.labels, layer, options)


PART = register(Part(
    "causal", causal, needs=("labels",), title="The SAE inside its encoder",
    about="What the encoder's output still says of the classes when the features at the SAE's place are replaced, when "
    "k latents of a picture's class are kept alone or removed, and when single latents are ablated on their top "
    "pictures.",
    columns=(
        Column("recovered", "causal_recovered", "against=mean", better=True, about="share of the cross-entropy between "
               "mean-ablated and kept features that reconstructions win back"),
        Column("from zero", "causal_recovered", "against=zero", about="the same from zeroed features, which flatters"),
        *(Column(name, "causal_accuracy", f"features={name}", form=".1%", over="accuracy, features")
          for name in WHOLE),
        *(Column(f"{{k}} {name}", "causal_accuracy", f"{what}={{k}},latents={name}", form=".1%",
                 over=f"accuracy, {what}") for what in ("kept", "removed") for name in ("typical", "random")),
        Column("{latents}", "causal_logit", "ablated=1,latents={latents}", form="+.3f", over="class logit, ablated"),
        Column("{latents}", "causal_kl", "ablated=1,latents={latents}", form=".4f", over="KL, ablated"),
        Column("distance", "causal_distance", "features=sae", about="of reconstructions, natural features have 1"),
    ),
))  # fmt: skip
