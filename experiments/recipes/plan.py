"""What is trained: each recipe of the papers with and without its ingredient, on four sets of real features.

Names of sets, recipes, variants and arms are those of the table; ``Planned.overrides`` is what one would type after
``train.py``. MonoLoss keeps the paper's presets (``conf/experiment/monoloss``) and its weights for ImageNet and the
supervised ViT, but that the weights of L1 and L0 are steered to one L0; sizes, learning rate and length are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STEPS, D_SAE, K, LR = 300, 1536, 32, 1e-3
BATCH = 512  # with MonoLoss, which compares the tokens of a batch; half as many without
SEEDS = (0, 1, 2)

EFFICIENTNET, VIT = "efficientnet_lite0", "dinov2_s_saliency"  # folders of ``encoders``

SETS = {  # by name: the encoder, and what chooses its features
    "EfficientNet pooled": (EFFICIENTNET, ("features=pooled",)),
    "EfficientNet 7×7 map": (EFFICIENTNET, ("features=patch",)),
    "ViT-S (saliency) class token": (VIT, ("features=cls", "backbone.layer=10")),
    "ViT-S (saliency) patches": (VIT, ("features=patch", "backbone.layer=10")),
}

MONOLOSS = {"batchtopk": 4e-4, "topk": 0.09, "jumprelu": 7e-4, "vanilla": 9e-5}  # the paper's weights

STEERED, SPARSER = ("jumprelu", "vanilla"), 24  # steered to two L0s without MonoLoss, which changes theirs

NORMS = (0.1, 0.3, 1)  # of the encoder's rows at the start
VARIANTS = ("topk", "batchtopk", "matryoshka", "jumprelu", "gated", "relu", "msae")

ONCE = ("trainer.max_epochs=1000", f"trainer.max_steps={STEPS}", "trainer.check_val_every_n_epoch=1000")


@dataclass(frozen=True)
class Planned:
    """One training: its place in the table, and what tells ``train.py`` to do it."""

    features: str
    recipe: str
    variant: str
    arm: str
    seed: int
    overrides: tuple[str, ...]


def planned(seeds: tuple[int, ...] = SEEDS, sets: tuple[str, ...] = tuple(SETS), starts: bool = False) -> list[Planned]:
    """The whole table's runs, all of one seed before the next; with ``starts`` those of the table of starts."""
    return [
        Planned(features, *place, seed, (*SETS[features][1], *recipe, f"seed={seed}"))
        for seed in seeds
        for features in sets
        for *place, recipe in (_starts if starts else _recipes)()
    ]


Recipe = tuple[str, str, str, tuple[str, ...]]  # recipe, variant, arm and overrides


def _recipes() -> Iterator[Recipe]:
    """What is trained on one set."""
    common = _common()
    for sae, weight in MONOLOSS.items():
        preset = (f"experiment=monoloss/{sae}", *common, f"batch_size={BATCH}")
        without, loss = "callbacks.monoloss.weight=0", f"callbacks.monoloss.weight={weight}"
        if sae in STEERED:
            for l0 in (K, SPARSER):
                yield "MonoLoss", sae, f"without, L0 {l0}", (*preset, f"sae.target_l0={l0}", without)
            yield "MonoLoss", sae, "with", (*preset, f"sae.target_l0={K}", loss)
        else:
            yield "MonoLoss", sae, "without", (*preset, without)
            yield "MonoLoss", sae, "with", (*preset, loss)
    half = (*common, f"batch_size={BATCH // 2}")
    plain = (*half, "loss.aux=0")
    yield "Matryoshka", "batchtopk", "without", ("sae=batchtopk", *plain)
    yield "Matryoshka", "batchtopk", "with", ("sae=matryoshka", *plain)
    for sae in ("batchtopk", "topk"):  # from a short encoder, with which latents die
        dying = (f"sae={sae}", *half, "+sae.settings.encoder_norm=0.1", f"dead_after={25 * BATCH // 2}")
        yield "AuxK", sae, "without", (*dying, "loss.aux=0")
        yield "AuxK", sae, "with", dying
    for k in (K, 4 * K):
        yield "MSAE", "topk", f"k {k}", ("sae=topk", *plain, f"sae.settings.k={k}")
    for weight in (0.1, 1):
        relu = ("sae=relu", *plain, "sae.target_l0=null", f"loss.sparsity={weight}")
        yield "MSAE", "relu", f"weight {weight}", relu
    for weighting in ("uniform", "reverse"):
        yield "MSAE", "msae", weighting, ("sae=msae", *plain, f"sae.settings.weighting={weighting}")


def _starts() -> Iterator[Recipe]:
    """Each variant from three lengths of the encoder's rows, and the tied TopK with its gradient projected or not."""
    half = (*_common(), f"batch_size={BATCH // 2}")
    for sae in VARIANTS:
        for norm in NORMS:
            yield "start", sae, f"{norm:g}", (f"sae={sae}", *half, f"++sae.settings.encoder_norm={norm}")
    for project in (False, True):
        tied = ("sae=topk", *half, "sae.settings.tied=true", f"+optimizer.project={str(project).lower()}")
        yield "projection", "topk", "projected" if project else "free", tied


def _common() -> tuple[str, ...]:
    return (*ONCE, f"d_sae={D_SAE}", f"k={K}", f"optimizer.lr={LR}", "stream.buffer_mb=2048")


def places(data: Path, encoders: Path, stores: Path, runs: Path, features: str) -> tuple[str, ...]:
    """Overrides that say where things lie: the photographs, the folder of both encoders, stores and runs."""
    encoder = SETS[features][0]
    library = {
        EFFICIENTNET: (
            "backbone=timm", "backbone.published.model=tf_efficientnet_lite0",
            f"backbone.published.weights='{encoders / EFFICIENTNET}'",
        ),
        VIT: (
            "backbone=transformers", f"backbone.published.model={VIT}",
            f"backbone.published.weights='{encoders / VIT}'",
        ),
    }[encoder]  # fmt: skip
    return (
        "data=hf", f"data.id='{data}'", "data.name=imagenette", "data.splits.val=null", "data.splits.test=validation",
        *library, f"backbone.name={encoder}", f"paths.stores='{stores}'", f"paths.runs='{runs}'",
    )  # fmt: skip
