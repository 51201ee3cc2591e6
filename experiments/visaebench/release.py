"""Finished and scored runs as a release: safetensors with cards, an index, checksums; on the model hub if asked.

    python -m experiments.visaebench.release --runs 'runs/visaebench/*' --out releases/visaebench \\
        [--license mit] [--repo org/name [--layout repo-per-sae] [--private]]

Each SAE becomes a folder named like its run, with what ``SAE.save`` writes, its scores and a card. It is written
beside, loaded, compared with the run's SAE (weights; codes of random features; bit for bit), and only then
moved to its place. A second call leaves alone what is whole and made from the same files; a killed one goes on.
Absolute paths of the configuration are cut to their last part: a release does not tell where its maker keeps things.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from glob import glob
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from experiments.visaebench.release_cards import address_of, index_card, sae_card
from sae_lightning import __version__
from sae_lightning.analysis.grid import read_grid
from sae_lightning.files import write_json
from sae_lightning.runs.run import LATENTS
from sae_lightning.runs.scores import TABLE, read_rows
from sae_lightning.saes import SAE
from sae_lightning.saes.artefact import ArtefactError, HubError, read_cfg, upload

FORMAT = 1  # of a released folder; raised when its content changes
WEIGHTS, SUMS = "sae.safetensors", "SHA256SUMS"
MADE_FROM = (WEIGHTS, "cfg.json", TABLE, LATENTS)  # files of a run
TOP = ("README.md", "index.csv", "index.json")
ARTEFACT_KEYS = ("schema", "variant", "d_in", "d_sae", "sae")  # of cfg.json, which SAE.save writes
LAYOUTS = ("one-repo", "repo-per-sae")


class ReleaseError(ValueError):
    """Runs that cannot be released."""


def find_runs(patterns: Sequence[str]) -> list[Path]:
    """Run folders, finished or not, that ``patterns`` name: themselves, or the folders that hold them; sorted by name.

    ReleaseError when there are none, and for two of the same name.
    """
    named = [Path(path) for pattern in patterns for path in glob(str(Path(pattern).expanduser()))]
    found = {p.resolve(): p for path in named for p in ([path] if is_run(path) else path.glob("*")) if is_run(p)}
    if not found:
        raise ReleaseError(f"No run is found at {' '.join(patterns)}; give run folders, or the folder that holds them.")
    runs = sorted(found.values(), key=lambda run: run.name)
    for one, next_one in pairwise(runs):
        if one.name == next_one.name:
            raise ReleaseError(f"{one} and {next_one} have the same name; release one of them.")
    return runs


def is_run(path: Path) -> bool:
    """Whether a training was begun in the folder ``path``."""
    return any((path / name).exists() for name in ("cfg.json", "result.json", "checkpoints", ".lock"))


def releasable(
    runs: Sequence[Path], split: str = "test", unscored: bool = False, skip_unfinished: bool = False
) -> list[Path]:
    """The ``runs`` that are finished and have scores on ``split``.

    ReleaseError, which names the others: for unfinished runs unless ``skip_unfinished`` leaves them out, for finished
    ones without scores unless ``unscored`` admits them, and when none is left.
    """
    finished = [run for run in runs if (run / "result.json").is_file() and (run / WEIGHTS).is_file()]
    if len(finished) < len(runs) and not skip_unfinished:
        raise ReleaseError(
            f"{_named([run for run in runs if run not in finished])} not finished; go on with train.py, or leave such "
            "runs out with --skip-unfinished."
        )
    without = [run for run in finished if not any(row["split"] == split for row in read_rows(run))]
    if without and not unscored:
        raise ReleaseError(
            f"{_named(without)} not scored on the {split} split; call evaluate.py metrics=visaebench, or release them "
            "without scores by --unscored."
        )
    if not finished:
        raise ReleaseError("No finished run is left to release.")
    return finished


def _named(runs: Sequence[Path]) -> str:
    names = ", ".join(run.name for run in runs[:3]) + (", …" if len(runs) > 3 else "")
    return f"{len(runs)} run{'s are' if len(runs) > 1 else ' is'} ({names})"


# --- one SAE ----------------------------------------------------------------------------------------------------
def release_sae(run: Path, folder: Path, address: str, split: str = "test", license: str | None = None) -> bool:
    """Write the SAE of ``run`` to ``folder``, to be loaded from ``address``; False if it was there already, whole.

    ReleaseError when the written SAE does not give the codes of the run's, bit for bit.
    """
    made_from = {name: sha256(run / name) for name in MADE_FROM if (run / name).is_file()}
    options = {"format": FORMAT, "address": address, "split": split, "license": license, "version": __version__}
    key = hashlib.sha256(json.dumps([made_from, options], sort_keys=True).encode()).hexdigest()
    if is_whole(folder) and read_cfg(folder).get("release", {}).get("key") == key:
        return False
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    sae, cfg = SAE.load(run), without_places(read_cfg(run))
    record = {name: value for name, value in cfg.items() if name not in ARTEFACT_KEYS}
    sae.save(partial, **record, release={"run": run.name, "key": key})
    for name in (TABLE, LATENTS):
        if (run / name).is_file():
            shutil.copyfile(run / name, partial / name)
    scores = [row for row in read_rows(run) if row["split"] == split]
    (partial / "README.md").write_text(sae_card(cfg, scores, address, split, license), encoding="utf-8")
    if not equal(sae, SAE.from_pretrained(partial)):
        raise ReleaseError(f"The SAE written for {run.name} is not that of the run, bit for bit; it was not released.")
    names = sorted(path.name for path in partial.iterdir())
    (partial / SUMS).write_text("".join(f"{sha256(partial / name)}  {name}\n" for name in names), encoding="utf-8")
    for path in partial.iterdir():
        path.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
    return True


def equal(one: SAE, other: SAE, samples: int = 256, seed: int = 0) -> bool:
    """Whether both have the same weights, and codes and reconstructions of random raw features, bit for bit."""
    noise = torch.randn(samples, one.d_in, generator=torch.Generator().manual_seed(seed))
    features = one.normalizer.denormalize(noise)
    with torch.no_grad():
        a, b = one.eval().encode(features), other.eval().encode(features)
        pairs = [(a.latents, b.latents), (a.values, b.values), (a.offsets, b.offsets), (one.decode(a), other.decode(b))]
    weights = other.state_dict()
    pairs += [(tensor, weights[name]) for name, tensor in one.state_dict().items()]
    return all(torch.equal(x, y) for x, y in pairs)


def without_places(config: Any) -> Any:
    """``config`` with absolute paths cut to their last part, and without sections that say where things lie."""
    if isinstance(config, Mapping):
        return {key: without_places(value) for key, value in config.items() if key not in ("paths", "logger")}
    if isinstance(config, list | tuple):
        return [without_places(value) for value in config]
    if isinstance(config, str) and (config.startswith("~") or Path(config).is_absolute()):
        return Path(config).name
    return config


def is_whole(folder: Path) -> bool:
    """Whether the released ``folder`` has all files that its checksums name, unchanged."""
    if not (folder / SUMS).is_file():
        return False
    lines = (line.split("  ", 1) for line in (folder / SUMS).read_text(encoding="utf-8").splitlines())
    return all((folder / name).is_file() and sha256(folder / name) == digest for digest, name in lines)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the release ------------------------------------------------------------------------------------------------
def release(
    runs: Sequence[Path], out: Path, repo: str | None = None, layout: str = "one-repo", split: str = "test",
    license: str | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Write all ``runs`` and the index to ``out``; returns the index. Folders of earlier calls for other runs stay, but
    are not in the index."""
    out.mkdir(parents=True, exist_ok=True)
    apart = layout == "repo-per-sae"
    addresses = [address_of(repo, out, run.name, apart) for run in runs]
    written = [
        release_sae(run, out / run.name, address, split, license)
        for run, address in zip(tqdm(runs, unit="SAE", disable=None), addresses, strict=True)
    ]
    folders = [out / run.name for run in runs]
    index = index_of(folders, addresses, split)
    write_json(out / "index.json", {"sae_lightning": __version__, "split": split, "saes": _plain(index)})
    _write(out / "index.csv", index.to_csv(index=False))
    cfgs = [read_cfg(out / name) for name in index["folder"]]
    name = repo.rsplit("/", 1)[-1] if repo else out.resolve().name
    _write(out / "README.md", index_card(name, index, cfgs, split, license, checked=not apart))
    sums = [f"{sha256(out / name)}  {name}\n" for name in TOP]
    for folder in folders:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        sums += [f"{digest}  {folder.name}/{name}\n" for digest, name in (line.split("  ", 1) for line in lines)]
    _write(out / SUMS, "".join(sums))
    kept = len(written) - sum(written)
    print(f"{out}: {sum(written)} SAEs written, {kept} were there already, all equal to their runs'.")
    return index


def index_of(folders: Sequence[Path], addresses: Sequence[str], split: str) -> pd.DataFrame:
    """One row a released SAE: where it is, its settings, M1–M7 and downstream tasks, size and checksum.

    Sorted by backbone, variant, expansion, k and seed.
    """
    index = read_grid(folders, split).rename(columns={"run": "folder"})
    index.insert(1, "address", list(addresses))
    index["bytes"] = [(folder / WEIGHTS).stat().st_size for folder in folders]
    index["sha256"] = [sha256(folder / WEIGHTS) for folder in folders]
    return index.sort_values(["data", "backbone", "layer", "variant", "expansion", "d_sae", "k", "seed", "folder"])


def _plain(index: pd.DataFrame) -> list[dict[str, Any]]:
    return json.loads(index.to_json(orient="records", double_precision=15))


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def push(out: Path, index: pd.DataFrame, repo: str, layout: str = "one-repo", private: bool = False) -> list[str]:
    """Upload the release in ``out`` to ``repo``, or each SAE to ``repo-<its name>`` and the index to ``repo``.

    Returns the commits' addresses; what the hub has already is not sent again. HubError as in ``hub.upload``.
    """
    if layout == "one-repo":
        only = [*TOP, SUMS, *(f"{name}/*" for name in index["folder"])]
        return [upload(out, repo, f"Add {len(index)} SAEs", private, only)]
    rows = list(zip(index["folder"], index["address"], strict=True))
    return [
        *(
            upload(out / name, address, f"Add {name}", private)
            for name, address in tqdm(rows, unit="SAE", disable=None)
        ),
        upload(out, repo, f"Index {len(index)} SAEs", private, list(TOP)),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, help="run folders, patterns, or the folder that holds them")
    parser.add_argument("--out", type=Path, required=True, help="folder of the release")
    parser.add_argument("--repo", help="org/name on the model hub, to upload to")
    parser.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0], help="one repository, or one for each SAE")
    parser.add_argument("--private", action="store_true", help="make repositories private")
    parser.add_argument("--license", help="an id as the hub knows it, such as mit; without, cards say 'unknown'")
    parser.add_argument("--split", default="test", help="the scores' split")
    parser.add_argument("--unscored", action="store_true", help="release runs without scores too")
    parser.add_argument("--skip-unfinished", action="store_true", help="leave unfinished runs out")
    args = parser.parse_args(arguments)
    try:
        runs = releasable(find_runs(args.runs), args.split, args.unscored, args.skip_unfinished)
        index = release(runs, args.out, args.repo, args.layout, args.split, args.license)
    except (ReleaseError, ArtefactError) as error:
        raise SystemExit(str(error)) from error
    if args.repo:
        try:
            print("\n".join(push(args.out, index, args.repo, args.layout, args.private)))
        except HubError as error:
            raise SystemExit(
                f"{error}\nThe release lies complete in {args.out}; the same call uploads it later."
            ) from error


if __name__ == "__main__":
    main()
