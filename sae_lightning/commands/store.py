"""``sae-lightning store ls | verify | stats | merge | join | import``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress

from sae_lightning.backbones.taps import KINDS
from sae_lightning.features.codec import DTYPES
from sae_lightning.features.foreign import SUFFIXES
from sae_lightning.features.importing import column_of, counted, import_features
from sae_lightning.features.manifest import MANIFEST, SEVERE, Manifest, StoreError
from sae_lightning.features.store import FeatureStore
from sae_lightning.features.upkeep import find_stores, join_modalities, mend, merge_stores, unfinished
from sae_lightning.rendering.table import Head, Table

OUTLIER = 6  # times the median dimension's root mean square


def main(arguments: Sequence[str]) -> int:
    """Run one of the verbs; the exit status. StoreError or OSError with a sentence."""
    top = argparse.ArgumentParser(
        "sae-lightning store", description="List, check, describe, merge and import feature stores."
    )
    verbs = top.add_subparsers(required=True, metavar="verb")

    ls = verbs.add_parser("ls", help="all stores below a folder, finished or not")
    ls.add_argument("root", nargs="?", default="stores", type=Path)
    ls.set_defaults(run=_ls)

    verify = verbs.add_parser("verify", help="read every byte and compare with the checksums")
    verify.add_argument("folder", nargs="+", type=Path, help="stores, or folders that hold some")
    verify.add_argument("--mend", action="store_true", help="remove damaged shards, so that extract.py redoes them")
    verify.set_defaults(run=_verify)

    stats = verbs.add_parser("stats", help="what a store holds and how its features are distributed")
    stats.add_argument("folder", nargs="+", type=Path)
    stats.set_defaults(run=_stats)

    merge = verbs.add_parser("merge", help="one store of several with different images; linked, not copied")
    merge.add_argument("folder", nargs="+", type=Path)
    merge.add_argument("--into", required=True, type=Path, metavar="FOLDER")
    merge.set_defaults(run=_merge)

    join = verbs.add_parser("join", help="one store of image embeddings and of their captions', to train on both")
    join.add_argument("images", type=Path, help="the store of features=embedding")
    join.add_argument("texts", type=Path, help="that of features=text")
    join.add_argument("--into", required=True, type=Path, metavar="FOLDER")
    join.set_defaults(run=_join)

    of_others = verbs.add_parser(
        "import", help="a store of features of other programs", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    of_others.add_argument(
        "source", nargs="+", type=Path, help=f"files ({', '.join(SUFFIXES)}), or folders of them, of saev or an LMDB"
    )
    of_others.add_argument("--into", required=True, type=Path, metavar="FOLDER", help="the store to be made")
    of_others.add_argument("--backbone", help="the encoder, as it is to be shown")
    of_others.add_argument("--layer", type=int, help="of the encoder, from 0; of saev's shards the one to take")
    of_others.add_argument("--features", choices=KINDS, help="what they are; patch for several tokens an image")
    of_others.add_argument("--grid", type=_grid, metavar="16x16", help="of patches, where rows are single tokens")
    of_others.add_argument("--prefix", type=int, help="tokens of an image before its patches, such as a class token")
    of_others.add_argument("--labels", type=Path, metavar="FILE", help=".npy, or a line of text an image")
    of_others.add_argument("--ids", type=Path, metavar="FILE", help="the same, names of the images")
    of_others.add_argument("--data", default="imported", help="what the data set is called")
    of_others.add_argument(
        "--split", default="train", choices=("train", "val", "test"), help="which part of it this is"
    )
    of_others.add_argument("--dtype", default="float16", choices=tuple(DTYPES), help="how features are stored")
    of_others.add_argument("--memory-gb", default=1.0, type=float, help="about as much is used")
    of_others.set_defaults(run=_import)

    args = top.parse_args(arguments)
    return args.run(args)


def _ls(args: argparse.Namespace) -> int:
    folders = find_stores(args.root)
    if not folders:
        raise StoreError(f"There is no store in {args.root}; make one with extract.py, or name another folder.")
    rows: list[list[object]] = []
    styles, broken = [], []
    for folder in folders:
        name = str(folder.relative_to(args.root))
        try:
            if not (folder / MANIFEST).is_file():
                shards, images = unfinished(folder)
                rows.append([name, images, f"unfinished, {shards} shards so far", "", "", ""])
                styles.append("yellow")
                continue
            m = Manifest.read(folder)
        except StoreError as error:
            broken.append(str(error))
            continue
        size = decimal(sum(shard.bytes for shard in m.shards))
        rows.append([name, m.n_images, f"{m.n_patches} × {m.d_in}", m.dtype, size, m.backbone])
        styles.append("")
    heads = [Head("store"), Head("images", ",.0f"), *map(Head, ("shape", "type", "size", "backbone"))]
    Table("stores", "", heads, rows, styles=styles).show()
    for sentence in broken:
        Console().print(sentence, style="red", soft_wrap=True)
    return 1 if broken else 0


def _verify(args: argparse.Namespace) -> int:
    console, worst = Console(), 0
    say = partial(console.print, soft_wrap=True)
    folders = [
        f for given in _no_locks(args.folder) for f in ([given] if (given / MANIFEST).is_file() else find_stores(given))
    ]
    if not folders:
        raise StoreError(f"There is no store in {', '.join(map(str, args.folder))}.")
    with Progress(console=console, transient=True) as progress:
        for folder in progress.track(folders, description="Verifying"):
            if not (folder / MANIFEST).is_file():
                say(f"{folder}: unfinished; extract.py goes on from it.")
                continue
            try:
                store = FeatureStore(folder, Manifest.read(folder))
                bad, files = store.damage(verify=True), store.damaged_files()
            except StoreError as error:
                say(str(error), style="red")
                worst = 1
                continue
            for what in (*bad.values(), *files.values()):
                say(str(what), style="red")
            if not (bad or files):
                say(f"{folder}: whole.")
                continue
            worst = 1
            if args.mend:
                lost = mend(folder, bad)
                say(f"{folder}: removed {', '.join(lost)}; run extract.py again, which redoes these alone.")
    return worst


def _stats(args: argparse.Namespace) -> int:
    for folder in _no_locks(args.folder):
        store = FeatureStore.open(folder)
        m = store.manifest
        feature = m.kind if m.layer is None else f"{m.kind}, layer {m.layer}"
        feature += "" if m.site == "block" else f", site {m.site}"
        feature += f" ({m.prefix} before {m.grid[0]} x {m.grid[1]} patches)" if m.prefix else ""
        severe = f"; above {SEVERE:g}: centre, with normalize=standard" if m.severity > SEVERE else ""
        rows = {
            "features": f"{feature}, of {m.backbone}", "images": f"{m.data}, {m.split}: {len(store):,}",
            "shape": f"[{len(store)}, {m.n_patches}, {m.d_in}] {m.dtype} in {len(m.shards)} shards",
            "size": decimal(sum(shard.bytes for shard in m.shards)),
            "left out": f"{m.skipped_images} unreadable pictures" if m.skipped_images else "nothing",
            "mean length of a token": f"{m.mean_norm:.4g}", "deviation (scalar)": f"{m.std:.4g}",
            "severity γ = ‖μ‖/‖σ‖": f"{m.severity:.3g}{severe}",
            "variance lost by rounding": f"{m.rounding:.2e}, of the worst dimension {m.rounding_worst:.2e}",
            "outlier dimensions": _outliers(store), "images a class": _classes(store),
            "fingerprint": m.fingerprint, "made with": ", ".join(f"{k} {v}" for k, v in m.versions.items()),
        }  # fmt: skip
        Table("stats", str(folder), [Head(""), Head("", wraps=True)], list(rows.items())).show()
    return 0


def _no_locks(paths: Sequence[Path]) -> list[Path]:
    """``paths`` without the lock files beside stores, which a shell's ``train-*`` also names."""
    return [path for path in paths if path.suffix != ".lock" or path.is_dir()]


def _outliers(store: FeatureStore) -> str:
    """Dimensions whose root mean square is far above the median one's, largest first: how far, and how off zero."""
    rms = (store.mean.square() + store.deviation.square()).sqrt()
    times, off = rms / rms.median().clamp_min(1e-12), store.mean.abs() / store.deviation.clamp_min(1e-12)
    found = times.argsort(descending=True)[: int((times > OUTLIER).sum())].tolist()
    shown = ", ".join(f"{i} ({float(times[i]):.3g} medians, |μ|/σ {float(off[i]):.3g})" for i in found[:5])
    many = f"{len(found)} of {store.d_in}, rms above {OUTLIER} medians: {shown}{' …' if len(found) > 5 else ''}"
    return many if found else f"none with an rms above {OUTLIER} medians"


def _classes(store: FeatureStore) -> str:
    counts = torch.bincount(store.labels, minlength=len(store.class_names))
    if len(counts) > 12:
        return f"{len(counts)} classes, {int(counts.min())} to {int(counts.max())} images"
    return ", ".join(f"{name} {int(n)}" for name, n in zip(store.class_names, counts, strict=True))


def _merge(args: argparse.Namespace) -> int:
    return _made(args.into, merge_stores(_no_locks(args.folder), args.into))


def _join(args: argparse.Namespace) -> int:
    return _made(args.into, join_modalities(args.images, args.texts, args.into))


def _import(args: argparse.Namespace) -> int:
    labels, ids = (None if file is None else column_of(file) for file in (args.labels, args.ids))
    with counted(f"Importing into {args.into}") as progress:
        store = import_features(
            args.source, args.into, args.backbone, kind=args.features, layer=args.layer, grid=args.grid,
            prefix=args.prefix, labels=labels, ids=ids, data=args.data, split=args.split, dtype=args.dtype,
            memory_gb=args.memory_gb, progress=progress,
        )  # fmt: skip
    m = store.manifest
    print(f"{args.into}: {len(store):,} x {m.n_patches} x {m.d_in}, {m.kind}, of {m.backbone}.")
    features = "" if m.kind == "patch" else f" features={m.kind}"
    print(f"Train with: python train.py data=features data.train={args.into}{features}")
    return 0


def _grid(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"'{text}' is no grid such as 16x16, rows x columns")
    return int(found[1]), int(found[2])


def _made(folder: Path, store: FeatureStore) -> int:
    print(f"{folder}: {len(store):,} images in {len(store.manifest.shards)} shards.")
    return 0
