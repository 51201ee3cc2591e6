"""All variants on one plane, and how much of the features each recovers from its k largest latents.

    python train.py -m experiment=variants
    python -m experiments.variants.compare [--runs runs] [--stores stores] [--out experiments/variants]

Writes ``plane.png`` (L0 against explained variance on the val split, one line a variant), ``recovery.png``
(progressive recovery, MSAE §4.7: explained variance of the k largest latents of each token) and the figures
behind them as ``variants.json``. Only runs on one backbone, expansion and seed are compared.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.progress import track

from sae_lightning.features.store import FeatureStore
from sae_lightning.metrics import Reconstruction
from sae_lightning.runs.run import Run
from sae_lightning.saes import SAE

TOKENS = 16_384  # of the val split, for the recovery curve


def finished(folder: Path, backbone: str, expansion: int, seed: int) -> list[dict[str, Any]]:
    """Records of the finished runs that are compared, each with its folder."""
    runs = [Run(path.parent) for path in sorted(folder.glob("*/result.json"))]
    records = [run.cfg | {"result": run.result, "folder": run.folder} for run in runs]
    wanted = {"name": backbone, "expansion": expansion, "seed": seed}
    return [
        r
        for r in records
        if {"name": r["config"]["backbone"]["name"], "expansion": r["expansion"], "seed": r["seed"]} == wanted
    ]


def recovery(sae: SAE, store: FeatureStore, ks: list[int]) -> list[float]:
    """Explained variance of val tokens from each token's k largest latents, for every k."""
    images = max(1, TOKENS // store.n_patches)
    features = store.features(slice(0, images)).reshape(-1, store.d_in).float()
    scores = [Reconstruction(store.d_in, center=store.mean) for _ in ks]
    with torch.no_grad():
        for part in features.split(2048):
            codes = sae.encode(part)
            for score, k in zip(scores, ks, strict=True):
                score.update(part, sae.decode(codes.top(k)))
    return [float(score.compute()["explained_variance"]) for score in scores]


def store_of(record: dict[str, Any], stores: Path) -> FeatureStore:
    """The val store that the run was made with; FileNotFoundError says how to have it."""
    wanted = record["store"]["val"]
    for manifest in stores.glob("**/manifest.json"):
        if json.loads(manifest.read_text(encoding="utf-8"))["fingerprint"] == wanted:
            return FeatureStore.open(manifest.parent)
    raise FileNotFoundError(
        f"No store in {stores} has the fingerprint {wanted[:12]}…; run extract.py for this backbone."
    )


def draw(lines: dict[str, tuple[list[float], list[float]]], x: str, path: Path, title: str) -> None:
    """One line a variant, explained variance over ``x`` on a logarithmic axis."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for number, (name, (xs, ys)) in enumerate(lines.items()):
        axis.plot(xs, ys, marker="osD^vPX*"[number % 8], label=name)
    axis.set(xscale="log", xlabel=x, ylabel="explained variance (val)", title=title)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--stores", type=Path, default=Path("stores"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--backbone", default="dinov2")
    parser.add_argument("--expansion", type=int, default=8)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--k", type=int, default=16, help="whose runs the recovery curves are of")
    args = parser.parse_args()
    records = finished(args.runs, args.backbone, args.expansion, args.seed)
    if not records:
        raise SystemExit(f"No finished run in {args.runs} fits; run python train.py -m experiment=variants first.")
    by_variant: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        by_variant[record["variant"]].append(record)
    plane, curves, ks = {}, {}, [2**n for n in range(10)]
    for variant, group in track(sorted(by_variant.items()), description="Recovering"):
        group.sort(key=lambda r: r["result"]["val"]["l0"])
        plane[variant] = ([r["result"]["val"][n] for r in group] for n in ("l0", "explained_variance"))
        plane[variant] = tuple(plane[variant])
        one = [r for r in group if r["k"] == args.k]
        if one:
            curves[variant] = (ks, recovery(SAE.load(one[0]["folder"]), store_of(one[0], args.stores), ks))
    title = f"{records[0]['backbone']}, expansion {args.expansion}"
    args.out.mkdir(parents=True, exist_ok=True)
    draw(plane, "L0: active latents a token (val)", args.out / "plane.png", f"All variants, {title}")
    draw(
        curves, "largest latents kept a token", args.out / "recovery.png", f"Progressive recovery, {title}, k {args.k}"
    )
    figures = {"backbone": records[0]["backbone"], "expansion": args.expansion, "plane": plane, "recovery": curves}
    (args.out / "variants.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"Wrote plane.png, recovery.png and variants.json into {args.out}.")


if __name__ == "__main__":
    main()
