"""What is to be computed, counted from first principles: images, tokens, bytes, multiplications; no seconds."""

from __future__ import annotations

import math
from typing import NamedTuple

D_IN, BATCH = 768, 8192
EXPANSIONS, KS = (8, 16, 32), (64, 128, 192, 256)  # ViSAEBench Table 1
TRAIN, VAL = 1_281_167, 50_000  # images of ImageNet-1K
CLASSES, TASKS = 1000, 424  # and M7's tasks, of sibling classes in WordNet 3.0
HALF, FULL = 2, 4  # bytes of a float16 and a float32
LAYERS, MLP = 12, 4  # of a ViT-B; width of its MLP in widths of the model
JPEG = 110_000  # mean bytes of an ImageNet image: 144 GB over 1.33 million


class Backbone(NamedTuple):
    """A ViT-B: its ``patch`` size at 224 × 224, and tokens that are no patches (class, distillation)."""

    name: str
    patch: int
    extra: int

    @property
    def patches(self) -> int:
        return (224 // self.patch) ** 2


BACKBONES = (
    Backbone("dinov2", 14, 1), Backbone("clip", 16, 1), Backbone("siglip", 16, 0), Backbone("mae", 16, 1),
    Backbone("deit", 16, 2),
)  # fmt: skip


class Config(NamedTuple):
    """An SAE of the grid."""

    expansion: int
    k: int

    @property
    def d_sae(self) -> int:
        return self.expansion * D_IN


CONFIGS = tuple(Config(expansion, k) for expansion in EXPANSIONS for k in KS)


class Other(NamedTuple):
    """A data set of M6: images to train probes on and to test them, and classes."""

    name: str
    train: int
    test: int
    classes: int


INATURALIST = 50_000  # of limit=: five images a species, for training and for testing
OTHERS = (
    Other("inaturalist", INATURALIST, INATURALIST, 10_000), Other("cub200", 5_994, 5_794, 200),
    Other("dtd", 3_760, 1_880, 47),
)  # fmt: skip
OTHER_IMAGES = sum(other.train + other.test for other in OTHERS)


def encoder_flop(backbone: Backbone) -> int:
    """Of one image through a ViT-B: two a multiplication, of products alone."""
    n, d = backbone.patches + backbone.extra, D_IN
    block = (4 + 2 * MLP) * n * d * d + 2 * n * n * d  # projections and MLP; attention's two products
    return 2 * (LAYERS * block + backbone.patches * 3 * backbone.patch**2 * d)


def store_bytes(backbone: Backbone, images: int) -> int:
    """Patch tokens in float16."""
    return images * backbone.patches * D_IN * HALF


def steps(backbone: Backbone, epochs: int = 1) -> int:
    """Training steps over all patch tokens of ImageNet's train images (``data=imagenet`` keeps 1 % of them for val)."""
    return epochs * math.ceil(TRAIN * backbone.patches / BATCH)


def product_flop(config: Config) -> int:
    """The encoder's product of one step."""
    return 2 * BATCH * D_IN * config.d_sae


def selection_bytes(config: Config) -> int:
    """Pre-activations of one step in bfloat16: written, counted, gathered."""
    return 3 * BATCH * config.d_sae * HALF


def sparse_bytes(config: Config) -> int:
    """Rows of float32 that the sparse products of a step read, one an entry each: decode and both weight gradients."""
    return 3 * BATCH * config.k * D_IN * FULL


def optimizer_bytes(config: Config) -> int:
    """Of one step of ``UnitRowAdam`` by PyTorch's operators: 48 reads and writes of a float32 matrix, as in its code.

    Decoder: projection 9, norm in float64 9, clipping 2, Adam 7, unit norm 3. Encoder: norm, clipping and Adam.
    """
    return 48 * D_IN * config.d_sae * FULL


def dense_flop(config: Config) -> int:
    """What the sparse products would be as dense ones: decode, the codes' gradient and both weight gradients."""
    return 4 * product_flop(config)


def sae_bytes(config: Config) -> int:
    """Weights on the disk, float32."""
    return (2 * D_IN * config.d_sae + config.d_sae + 2 * D_IN + 1) * FULL


def training_bytes(config: Config) -> int:
    """On the device for one SAE: weights, gradients and Adam's two moments."""
    return 4 * sae_bytes(config)


class Probe(NamedTuple):
    """A multinomial logistic regression: ``n`` images, ``d`` features, classes and iterations."""

    n: int
    d: int
    classes: int
    iterations: int


BUDGETS = tuple(2**i for i in range(11))  # M4: 1 … 1024 latents


def raw_probes() -> list[Probe]:
    """Once a backbone: M3's classifier, and M6's of the raw features. Iterations are the limits, reached or not."""
    return [Probe(VAL * 4 // 5, D_IN, CLASSES, 1000), *(Probe(o.train, D_IN, o.classes, 500) for o in OTHERS)]


def sae_probes() -> list[Probe]:
    """Once an SAE: M4's budgets; M6's of the reconstruction and of 128 latents. M3 fits none, M7's are tiny."""
    m4 = [Probe(VAL * 4 // 5, k, CLASSES, 500) for k in BUDGETS]
    return m4 + [Probe(o.train, d, o.classes, 500) for o in OTHERS for d in (D_IN, 128)]
