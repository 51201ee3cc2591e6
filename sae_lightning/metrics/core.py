"""What every evaluated run has: reconstruction, sparsity, MonoScore, purity and the decoder, from one pass."""

from __future__ import annotations

from sae_lightning.metrics.base import Score, SumMetric
from sae_lightning.metrics.intervals import named
from sae_lightning.metrics.monoscore import MonoScore
from sae_lightning.metrics.part import Column, Options, Part, ScoredRun, Streamed, register
from sae_lightning.metrics.protocols import RELEASED
from sae_lightning.metrics.purity import Purity
from sae_lightning.metrics.reconstruction import Reconstruction, WholeFVU
from sae_lightning.metrics.sparsity import L0, Firing

MSAE = "Metrics of MSAE"
NAMES = ("reconstruction", "l0", "firing", "mono", "purity")  # of what it streams
SHOWN = (  # what tables of runs show
    Column("expl. var.", "explained_variance", better=True),
    Column("R²", "r2", better=True, about="mean coefficient of determination of the dimensions"),
    Column("FVU", "fvu", better=False), Column("L0", "l0", form=".1f"),
    Column("dead", "dead_share", better=False, form=".1%"), Column("cosine", "cosine", better=True),
    Column("|cos| dec.", "decoder_cosine", better=False, about="mean |cosine| between decoder rows"),
    Column("nearest dec.", "decoder_nearest_cosine", better=False,
           about="mean largest cosine of a decoder row with another"),
    Column("MonoScore", "monoscore", better=True,
           about="mean over all latents of the activation-weighted similarity of image pairs"),
    Column("purity", "purity", better=True, about="share of a latent's dominant class among the images it fires on, "
           "mean over latents that fire"),
    Column("weighted", "weighted_purity", better=True, about="the same, each image weighted by its activation"),
    Column("top-9 purity", "top_purity", better=True, about="share of the most common class among a latent's top 9 "
           "images, mean over latents active on at least 10 images"),
)  # fmt: skip


def streams(about: Streamed, options: Options) -> dict[str, SumMetric]:
    """The sums of all of them; of purity where the images have classes."""
    sae, store = about.sae, about.store
    found: dict[str, SumMetric] = {
        "reconstruction": Reconstruction(sae.d_in, store.mean, store.n_patches), "l0": L0(),
        "firing": Firing(sae.d_sae), "mono": MonoScore(sae.d_sae, about.width),
    }  # fmt: skip
    return found | ({"purity": Purity(sae.d_sae, len(store.class_names))} if store.labelled else {})


def core(run: ScoredRun, options: Options) -> list[Score]:
    """What scores.json holds, which is written now with what belongs to single latents."""
    scores = run.summary(anew=True)
    found = {**scores["metrics"], "l0_share": scores["metrics"]["l0"] / run.sae.d_sae}
    l0, error = run.metric("l0", L0).deviations(), run.metric("reconstruction", Reconstruction).deviations()
    found |= {name: float(value) for name, value in (l0 | error).items()}
    found["l0_share_std"] = found["l0_std"] / run.sae.d_sae
    found["dead"] = run.sae.d_sae - scores["metrics"]["alive"]
    found["n_images"], found["n_tokens"] = scores["n_images"], scores["n_tokens"]
    sure = {name: each for of in NAMES if of != "purity" or run.labelled
            for name, each in run.metric(of, SumMetric).sure().items()}  # type: ignore[type-abstract]  # fmt: skip
    return named(found | {"similarity_baseline": scores["similarity"]["baseline"]}, sure)


def whole_streams(about: Streamed, options: Options) -> dict[str, SumMetric]:
    """The sums of the released package's M2."""
    return {"whole_fvu": WholeFVU(about.sae.d_in, center=about.store.mean)}


def whole(run: ScoredRun, options: Options) -> list[Score]:
    """M2 as the released package has it."""
    return named(run.metric("whole_fvu", WholeFVU).compute())


PART = register(Part(
    "core", core, streams, needs=("core",), title=MSAE,
    about="EVR is 1 − FVU; ± are standard deviations over samples; CKNNA whether images have the same neighbours as by "
    "features; DO the mean cosine of pairs of decoder rows.",
    undefined="no latent fires on enough images, or the features do not vary",
    otherwise={"compute": whole, "streams": whole_streams, "needs": ()},
    columns=(
        Column("M2 FVU", "fvu", better=False, headline="M2", protocol=RELEASED,
               about="variance of all numbers of the residual over that of the features'"),
        Column("M2 FVU", "fvu", better=False, headline="M2",
               about="share of the features' variance that the reconstruction misses"),
        Column("L0", "l0", form=".1f", about="active latents a token", always=True),
        Column("dead", "dead_share", better=False, form=".1%", about="share of latents that never fire", always=True),
        Column("EVR", "explained_variance", better=True, spread="fvu_std"),
        Column("cosine", "cosine", better=True, spread="cosine_std"),
        Column("signed", "decoder_orthogonality", form=".4f", over="DO"),
        Column("squared", "decoder_squared_cosine", better=False, form=".4f", over="DO"),
        Column("L0 / d_sae", "l0_share", form=".2%", spread="l0_share_std"),
        Column("dead", "dead", better=False, form=",.0f"),
    ),
))  # fmt: skip
