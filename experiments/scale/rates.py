"""What machines do a second: measured here, from a data sheet, or assumed; each says which."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.scale.measure import MEASURED
from experiments.scale.work import D_IN

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
GPUS = {"a100": (312e12, 19.5e12, 2.04e12), "h100": (989e12, 67e12, 3.35e12), "h200": (989e12, 67e12, 4.8e12)}


class Rate(NamedTuple):
    """A number with its ``unit`` and ``source``; ``kind`` is measured, data sheet or assumed."""

    value: float
    unit: str
    kind: str
    source: str


Rates = dict[str, Rate]


def rates(gpu: str = "h100", **changes: float) -> Rates:
    """All rates for a kind of GPU; ``changes`` replace values by name. ValueError for a name that is none."""
    if gpu not in GPUS:
        raise ValueError(f"Unknown GPU '{gpu}'; choose one of {', '.join(GPUS)}, and change its rates by --set.")
    matmul, single, memory = GPUS[gpu]
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    known = {
        "matmul": Rate(matmul, "FLOP/s", "data sheet", f"{gpu.upper()} SXM, bfloat16, dense"),
        "float32": Rate(single, "FLOP/s", "data sheet", f"{gpu.upper()} SXM, float32"),
        "memory": Rate(memory, "B/s", "data sheet", f"{gpu.upper()} SXM, HBM"),
        "matmul_share": Rate(0.4, "", "assumed", "of the data sheet's products that large products reach"),
        "memory_share": Rate(0.6, "", "assumed", "of the data sheet's memory rate that gathers and passes reach"),
        "host": Rate(0.003, "s", "assumed", "of Python and kernel launches for an SAE and step, not hidden"),
        "gpus_a_node": Rate(8, "", "assumed", "a node"),
        "cores": Rate(16, "", "assumed", "CPU cores for each GPU"),
        "core_share": Rate(0.7, "", "assumed", "of a core's rate that each of many cores reaches"),
        "read_node": Rate(5e9, "B/s", "assumed", "from the file system into a node"),
        "read_all": Rate(40e9, "B/s", "assumed", "from the file system into all nodes"),
        "write_node": Rate(3e9, "B/s", "assumed", "from a node into the file system"),
        "write_all": Rate(20e9, "B/s", "assumed", "from all nodes into the file system"),
        "host_memory": Rate(10e9, "B/s", "assumed", "of the solver's vectors on one core"),
        "loader": Rate(11e9, "B/s", "measured", "one loader from the page cache, two cores (README)"),
        "decode": Rate(found["decoding"]["images_per_second"], "/s", "measured", "one core, JPEG 500 × 375 to 224"),
        "probe_a": Rate(found["probing"]["a"], "s", "measured", "one core, an iteration, image, class and feature"),
        "probe_b": Rate(found["probing"]["b"], "s", "measured", "one core, an iteration, image and class"),
    }  # fmt: skip
    if wrong := set(changes) - set(known):
        raise ValueError(f"No rate is called {', '.join(sorted(wrong))}; there are {', '.join(known)}.")
    given = {name: known[name]._replace(value=v, kind="given", source="--set") for name, v in changes.items()}
    return known | given


class Law(NamedTuple):
    """seconds = latents · d_sae + active · k + fixed, fitted to measurements; ``worst`` relative error among them."""

    latents: float
    active: float
    fixed: float
    worst: float

    def __call__(self, d_sae: float, k: float) -> float:
        return self.latents * d_sae + self.active * k + self.fixed


@cache
def cpu_step() -> Law:
    """Seconds of a BatchTopK step a token on two cores (bfloat16 products, d_in 768), from the recorded benchmark."""
    rows = []
    for name in ("train_step_zen5_2cores", "train_step_zen5_2cores_shapes"):
        for row in _read(name):
            variant, expansion, k, batch, precision = row["case"].split()
            if (variant, precision, row["contender"]) == ("batchtopk", "bf16", "ours"):
                rows.append([D_IN * int(expansion[1:]), int(k[1:]), 1, row["median_s"] / int(batch[1:])])
    table = np.array(rows)
    found = np.linalg.lstsq(table[:, :3] / table[:, 3:], np.ones(len(table)), rcond=None)[0]
    worst = np.abs(table[:, :3] @ found / table[:, 3] - 1).max()
    latents, active, fixed = map(float, found)
    return Law(latents, active, fixed, float(worst))


ENCODING = {6144: 0.39, 24576: 1.29}  # seconds of 19,600 tokens on two cores when passes were timed (decisions.md)


def cpu_pass(d_sae: int, k: int) -> float:
    """Seconds of the scoring pass an image of 196 patches on two cores: encoding, and the rest in proportion to k.

    From the recorded benchmark at k = 64, linear between the two d_sae measured.
    """
    rows = {r["case"]: r["median_s"] for r in _read("evaluate") if r["contender"] == "ours"}
    encoding = {d: seconds * 196 / 19_600 for d, seconds in ENCODING.items()}
    rest = {d: rows[f"pass d{d}, 2000 images"] / 2000 - encoding[d] for d in ENCODING}
    return _between(encoding, d_sae) + _between(rest, d_sae) * k / 64


def _between(at: dict[int, float], d_sae: int) -> float:
    (low, below), (high, above) = at.items()
    return below + (above - below) * (d_sae - low) / (high - low)


@cache
def _read(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
