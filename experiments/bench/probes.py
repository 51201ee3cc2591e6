"""Probes at ImageNet's size: M3, M4 and M7 of one SAE, and the same probes as scikit-learn fits them.

    python -m experiments.bench.probes [--quick] [--json FILE] [--images 50000] [--reference]

Codes [images, d_sae] are made up, 1 % of them active: each class has latents of its own, some of which its siblings
share. ``--reference`` also fits scikit-learn's ``LogisticRegression`` to the same rows and columns, one budget after
another; at a tenth of the images it takes about a tenth of the time, for each of its steps goes over all of them.
Timed are the processor's seconds, which other processes do not change.
"""

from __future__ import annotations

import importlib
import resource
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from experiments.bench.timing import Row, print_table, shared_parser, write_json
from sae_lightning.metrics import probes
from sae_lightning.metrics.absorption import absorption
from sae_lightning.metrics.preservation import fit_raw, preservation
from sae_lightning.metrics.sparse_probing import BUDGETS, class_sums, f_statistics, ranked, sparse_probing

SIBLINGS = 7  # classes of a group
OWN, SHARED, ACTIVE = 60, 40, 0.01  # latents of a class, of a group, and the share that is active on an image


class World(NamedTuple):
    """Codes [n, d_sae] of images with ``labels`` [n], their raw and reconstructed features [n, d_in]."""

    codes: sparse.csr_array
    labels: np.ndarray
    raw: np.ndarray
    rebuilt: np.ndarray


def world(images: int, d_sae: int, classes: int, d_in: int) -> World:
    """Images of all classes in turn. A latent of a class or group fires on a third of its images, all others by a power
    law of their own rank."""
    rng = np.random.default_rng(0)
    own = np.concatenate(
        [
            rng.integers(0, d_sae, (classes, OWN)),
            rng.integers(0, d_sae, (classes // SIBLINGS + 1, SHARED)).repeat(SIBLINGS, 0)[:classes],
        ],
        1,
    )
    often = 1 / (50 + rng.permutation(d_sae)) ** 0.8
    labels = np.arange(images) % classes
    rest = rng.choice(d_sae, (images, int(ACTIVE * d_sae) - own.shape[1] // 3), p=often / often.sum())
    fires = rng.random((images, own.shape[1])) < 1 / 3
    latents = np.concatenate([rest, np.where(fires, own[labels], -1)], 1)
    rows, place = np.nonzero(latents >= 0)
    values = rng.gamma(2.0, 0.5, len(rows)).astype(np.float32)
    codes = sparse.csr_array((values, (rows, latents[rows, place])), (images, d_sae))
    codes.sum_duplicates()
    centres = rng.normal(size=(classes, d_in), scale=0.35).astype(np.float32)
    raw = centres[labels] + rng.normal(size=(images, d_in)).astype(np.float32)
    return World(codes, labels, raw, raw + 0.3 * rng.normal(size=raw.shape).astype(np.float32))


def parts(made: World, classes: int) -> dict[str, Callable[[], object]]:
    """What is timed, in the order of an evaluation."""
    split, names = probes.split(made.labels), [f"class {c}" for c in range(classes)]
    groups = {f"group {g}": names[g : g + SIBLINGS] for g in range(0, classes, SIBLINGS)}
    raw: list = []
    return {
        "raw probe, once a backbone": lambda: raw.append(fit_raw(made.raw, made.labels, split)),
        "M3 and a probe of all codes": lambda: preservation(raw[0], made.rebuilt, made.labels, made.codes),
        "M4, budgets 1 … 1024": lambda: sparse_probing(made.codes, made.labels, split),
        "M4 for each class": lambda: sparse_probing(made.codes, made.labels, split, ranking="per_class"),
        "M7": lambda: absorption(made.codes, made.labels, groups, names, split),
    }


def reference(made: World) -> dict[str, Callable[[], object]]:
    """The same probes by scikit-learn; of M4 for each class one class alone."""
    train = probes.split(made.labels).train
    y, codes = made.labels[train], made.codes[train]
    order = ranked(f_statistics(class_sums(codes, y)))[: max(BUDGETS)]
    x = codes[:, order].toarray()

    def fit(x: np.ndarray | sparse.csr_array, y: np.ndarray, max_iter: int = 500) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            print("   steps", LogisticRegression(max_iter=max_iter).fit(x, y).n_iter_)

    return {
        "raw probe, once a backbone": lambda: fit(made.raw[train], y, 1000),
        "M3 and a probe of all codes": lambda: fit(codes, y, 1000),
        "M4, budgets 1 … 1024": lambda: [fit(x[:, :k], y) for k in BUDGETS if k <= x.shape[1]],
        "M4 for each class": lambda: [fit(x[:, :k], y == 0) for k in BUDGETS if k <= x.shape[1]],
    }


def main() -> None:
    parser = shared_parser(__doc__, "1,000 images, 20 classes, 8,192 latents", repeats=1)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--d-sae", type=int, default=24_576)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--only", nargs="+", help="beginnings of the parts' names")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        args.images, args.classes, args.d_sae, args.d_in, args.reference = 1000, 20, 8192, 64, True
    made = world(args.images, args.d_sae, args.classes, args.d_in)
    contenders = {"ours": parts(made, args.classes)} | ({"scikit-learn": reference(made)} if args.reference else {})
    rows: list[Row] = []
    for who, calls in contenders.items():
        for name, call in calls.items():
            if args.only and not name.startswith(tuple(args.only)):
                continue
            start = time.process_time()
            call()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            rows.append(Row.of(f"{name}, {args.images} images", who, [time.process_time() - start], peak))
            print(rows[-1])
            if args.json:
                write_json(args.json, rows)
    print_table(rows)


if __name__ == "__main__":
    importlib.import_module("experiments.bench.probes").main()
