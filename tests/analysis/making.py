"""Tables like those of ``read_grid``, written here."""

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import pandas as pd

from sae_lightning.analysis.grid import METRICS

BACKBONES = ("dinov2", "clip", "siglip", "deit", "mae")


def grid(
    value: Callable[..., float] | None = None, backbones: Sequence[str] = BACKBONES, expansions=(8, 16, 32),
    ks=(64, 128), seeds=(42,), variant="batchtopk", layer=11, data="imagenet", **columns,
) -> pd.DataFrame:  # fmt: skip
    """A complete grid whose metrics are ``value(backbone, expansion, k, seed)``, or random; further ``columns``."""
    rng = np.random.default_rng(0)
    rows = []
    for backbone, expansion, k, seed in product(backbones, expansions, ks, seeds):
        cell = (backbone, expansion, k, seed)
        rows.append({
            "run": "-".join(map(str, (variant, layer, *cell))), "data": data, "backbone": backbone, "title": backbone,
            "features": "patch", "layer": float(layer), "variant": variant, "monoloss": 0.0, "recipe": "",
            "expansion": float(expansion), "k": float(k), "seed": seed, "d_in": 768, "d_sae": 768 * expansion,
            "l0": k + 0.5, "dead_share": 0.1, **{m: value(*cell) if value else rng.normal() for m in METRICS},
        })  # fmt: skip
    return pd.DataFrame(rows).assign(**columns)


def of_backbones(values: dict[str, dict[str, float]], data="imagenet") -> pd.DataFrame:
    """A grid of one configuration with ``values`` by column and backbone."""
    table = grid(backbones=tuple(next(iter(values.values()))), expansions=(8,), ks=(64,), data=data)
    return table.assign(**{column: table["backbone"].map(of) for column, of in values.items()})


def ranked(order: str) -> dict[str, float]:
    """Values of which the first of ``order`` has the most."""
    names = order.split()
    return {name: float(len(names) - i) for i, name in enumerate(names)}
