"""What a release says of its SAEs: a card for each, and one for all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import EvalResult, ModelCardData

from sae_lightning.analysis.grid import METRICS
from sae_lightning.metrics.part import downstream, headlines
from sae_lightning.runs.scores import value_of

LIBRARY = "sae-lightning"
TAGS = ("sparse-autoencoder", "interpretability", "vision", "visaebench")
DATASETS = {"imagenet": "ILSVRC/imagenet-1k", "demo": "uoft-cs/cifar10", "cifar10": "uoft-cs/cifar10"}  # ids on the hub
PLAIN = {
    "explained_variance": "explained variance", "l0": "L0", "dead_share": "dead share", "cosine": "cosine",
    "monoscore": "MonoScore", "purity": "purity",
}  # fmt: skip
TRAINED = ("batch_size", "normalize", "seed")  # of the config, shown in the table
Rows = Sequence[Mapping[str, Any]]

CARD = """# {name}

A {variant} sparse autoencoder for the {features} features of **{backbone}**, layer {layer}: {d_sae:,} latents for
{d_in:,} dimensions, trained on `{data}` with sae-lightning.

```python
from sae_lightning.saes import SAE
sae = SAE.from_pretrained("{address}")
```

`codes = sae.encode(features)` takes raw features [..., {d_in}] of that layer, as the encoder gives them, and
`sae.decode(codes)` gives them back; the normaliser and the threshold are inside.

## Scores on the {split} split

{scores}

## How it was trained

{config}

## Files

`sae.safetensors`: weights with the normaliser. `cfg.json`: what rebuilds the SAE, and the whole configuration.
`SHA256SUMS`: checksums, for `sha256sum -c`. Of a scored SAE also `scores.parquet`: every figure, one row a metric and
setting, and `latents.safetensors`: MonoScore, purity, Moran's I … of each latent.
{license}"""

INDEX = """# {name}

{n} sparse autoencoders for features of {backbones}.
Trained on {data} with sae-lightning, scored on the {split} split.

```python
from sae_lightning.saes import SAE
sae = SAE.from_pretrained("{address}")
```

{table}

M1 to M7 are those of ViSAEBench: {metrics}.
`index.csv` and `index.json` hold this table with all downstream tasks, sizes and checksums. Every SAE has a card of
its own, its configuration (`cfg.json`) and all of its figures (`scores.parquet`).{check}
{license}"""
NO_LICENSE = "\nNo licence has been stated yet.\n"


def sae_card(cfg: Mapping[str, Any], scores: Rows, address: str, split: str, license: str | None) -> str:
    """The card of one SAE: its ``cfg.json``, its ``scores`` on ``split``, and the ``address`` to load it from."""
    base, config = base_model(cfg), cfg["config"]
    data = ModelCardData(
        license=license or "unknown", library_name=LIBRARY, base_model=base, model_name=cfg["name"],
        tags=[*TAGS, cfg["variant"], config["backbone"]["name"]], datasets=datasets([cfg["data"]]),
        eval_results=results(cfg["data"], scores, split) or None,
    )  # fmt: skip
    shown = {"backbone": cfg["backbone"]} | ({"weights": base} if base else {})
    shown |= {"layer": cfg["layer"], "features": cfg["features"], "data": cfg["data"], "variant": cfg["variant"]}
    shown |= {"expansion": cfg["expansion"], "d_in": cfg["d_in"], "d_sae": cfg["d_sae"]} | dict(cfg["sae"])
    shown |= {name: config[name] for name in TRAINED}
    shown |= {f"{part}.{name}": config[part][name] for part, name in (("optimizer", "name"), ("optimizer", "lr"))}
    shown |= {f"loss.{name}": weight for name, weight in config["loss"].items() if weight}
    callbacks = {name: (each or {}).get("weight") for name, each in (config.get("callbacks") or {}).items()}
    shown |= {f"callbacks.{name}.weight": weight for name, weight in callbacks.items() if weight}
    shown |= {name: config["trainer"].get(name) for name in ("max_epochs", "precision")}
    shown |= {name: cfg["versions"][name] for name in ("torch", "lightning") if name in cfg.get("versions", {})}
    text = CARD.format(
        name=cfg["name"], variant=cfg["variant"], features=cfg["features"], backbone=cfg["backbone"], address=address,
        layer=cfg["layer"], d_sae=cfg["d_sae"], d_in=cfg["d_in"], data=cfg["data"], split=split,
        scores=_score_table(scores), config=markdown(["", ""], shown.items()), license="" if license else NO_LICENSE,
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def index_card(
    name: str, index: pd.DataFrame, cfgs: Sequence[Mapping[str, Any]], split: str, license: str | None,
    checked: bool,
) -> str:  # fmt: skip
    """The card of the release: a table of all SAEs in ``index``; ``checked``: it has checksums of all files."""
    base = sorted({model for model in map(base_model, cfgs) if model})
    tags = sorted({cfg["config"]["backbone"]["name"] for cfg in cfgs} | {cfg["variant"] for cfg in cfgs})
    data = ModelCardData(
        license=license or "unknown", library_name=LIBRARY, base_model=base or None, tags=[*TAGS, *tags],
        datasets=datasets(sorted({cfg["data"] for cfg in cfgs})),
    )  # fmt: skip
    columns = {"title": "backbone", "layer": "layer", "variant": "variant", "expansion": "×", "k": "k", "seed": "seed"}
    columns = {key: title for key, title in columns.items() if key != "seed" or index[key].nunique() > 1}
    figures = {"l0": "L0"} | {key: key for key in METRICS}
    rows = [
        [row.folder, *(_setting(row[key]) for key in columns), *(number(row[key], key) for key in figures)]
        for _, row in index.iterrows()
    ]
    text = INDEX.format(
        name=name, n=len(index), backbones=", ".join(sorted(set(index["title"]))), split=split,
        address=index["address"].iloc[0], data=", ".join(f"`{data}`" for data in sorted(set(index["data"]))),
        table=markdown(["SAE", *columns.values(), *figures.values()], rows),
        metrics=", ".join(about.title for about in METRICS.values()), license="" if license else NO_LICENSE,
        check="\n`sha256sum -c SHA256SUMS` checks all files." if checked else "",
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def results(data: str, scores: Rows, split: str) -> list[EvalResult]:
    """M1–M7, reconstruction and sparsity, and the downstream tasks among ``scores``, as a model index has them.

    Figures that are not finite are left out, which a model index cannot hold.
    """
    found = [(column.metric, column.title, data, column.of(scores)) for column in headlines()]
    found += [(metric, title, data, value_of(scores, metric)) for metric, title in PLAIN.items()]
    for row in scores:
        for task in downstream():
            if column := task.column(row["metric"], row["setting"]):
                (kind, _, on), given = column.rpartition("/")[0].partition(":"), column.rpartition("/")[2]
                found.append((row["metric"], f"{kind}, {given}", on or data, row["value"]))
    return [
        EvalResult(
            task_type="feature-extraction", dataset_type=DATASETS.get(on, on), dataset_name=on, dataset_split=split,
            metric_type=metric, metric_name=title, metric_value=value,
        )
        for metric, title, on, value in found
        if math.isfinite(value)
    ]  # fmt: skip


def base_model(cfg: Mapping[str, Any]) -> str | None:
    """The encoder's id on the hub; None for bundled ones, local weights and random ones."""
    backbone = cfg["config"]["backbone"]
    published = backbone.get("published") or {}
    if backbone["size"] == "tiny" or not published.get("pretrained") or published.get("weights"):
        return None
    name = str(published["model"])
    return name if "/" in name or published["library"] != "timm" else f"timm/{name}"


def datasets(names: Iterable[str]) -> list[str] | None:
    """Ids on the hub of the data sets that have one."""
    return [DATASETS[name] for name in names if name in DATASETS] or None


def _score_table(scores: Rows) -> str:
    shown = {column.title: column.of(scores) for column in headlines()}
    shown |= {title: value_of(scores, metric) for metric, title in PLAIN.items()}
    rows = [(title, number(value, title)) for title, value in shown.items() if math.isfinite(value)]
    return markdown(["metric", "value"], rows) if rows else "It has not been scored."


def number(value: float, name: str = "") -> str:
    """A figure as text, L0 with one decimal, others with three; – for one that is not finite."""
    return format(value, ".1f" if name.lower() == "l0" else ".3f") if math.isfinite(value) else "–"


def _setting(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}" if math.isfinite(value) else "–"
    return "–" if value is None else str(value)


def markdown(titles: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def address_of(repo: str | None, out: Path, name: str, apart: bool) -> str:
    """What ``SAE.from_pretrained`` takes for the SAE ``name``; ``apart``: each SAE has a repository of its own."""
    if repo is None:
        return f"{out.name}/{name}"
    return f"{repo}-{name}" if apart else f"{repo}/{name}"
