"""What the commands do, from Python and on tensors: no Hydra is needed to call it, each function is one line.

``import sae_lightning`` gives these names and loads nothing until one is used.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig
    from torch import Tensor

    from sae_lightning.data import ImageData
    from sae_lightning.features.store import FeatureStore
    from sae_lightning.saes import SAE

STEPS, MOST_EPOCHS = 2000, 100  # of a training whose epochs are not given: about so many, and at most

LANES = 8  # of which a batch is a multiple: ``stream.lanes``


def fit(
    features: Any, sae: str | type[SAE] = "batchtopk", *, k: float = 32, expansion: int = 8, d_sae: int | None = None,
    epochs: int | None = None, batch_size: int | None = None, lr: float | None = None, val: Any = 0.05,
    labels: Any = None, seed: int = 42, precision: str = "32-true", devices: int = 1, accelerator: str = "auto",
    loss: Mapping[str, float] | None = None, callbacks: Sequence[Any] = (), grid: tuple[int, int] | None = None,
    out: str | Path | None = None, progress: bool = True, settings: Mapping[str, Any] | None = None,
) -> SAE:  # fmt: skip
    """Train an SAE on ``features`` with the same Trainer, module and resume as ``train.py``; it is calibrated.

    ``features`` are [N, d_in] or tokens of images [n, P, d_in]: an array, a tensor, a memmap, a path or several
    (``.npy``, ``.pt``, ``.safetensors``, ``.parquet``, ``.tar``, or a folder), a DataLoader of tensors or of (features,
    labels), or a FeatureStore. They are written once as float16 in a store, so that what is larger than memory trains
    in about 1 GB beside the SAE; ``grid`` makes images of rows that are single patches. ``val`` is a share of the
    images or other features of the kind; ``labels`` [N] are kept for purity.

    ``sae`` is a choice of ``conf/sae`` or a subclass of ``SAE`` that is defined in a module which can be imported.
    ``loss`` weighs terms (``{"aux": 0.03}``); ``callbacks`` are Lightning's or ours (``MonoLoss(0.3)``) that keep their
    arguments under their names, or mappings with ``_target_``; ``settings`` are any others of ``train.py`` by their
    dotted names. Without ``epochs`` about 2,000 steps are made. With ``out`` the store and the run's folder stay in
    ``out/stores`` and ``out/runs``, and the same call goes on or gives what is finished; without, they are removed.

    Examples:
        >>> sae = sae_lightning.fit(features, k=32, expansion=16)
        >>> codes = sae.encode(features)

    ValueError in one sentence for features or settings that cannot be used.
    """
    with _folder(out) as folder:
        store = _store_of(features, folder, labels=labels, grid=grid, progress=progress)
        held_out = isinstance(val, float)
        tokens = round(store.n_tokens * (1 - 2 * val if held_out else 1))
        if tokens < 2 * LANES:
            raise ValueError(f"There are {store.n_tokens} rows of features, of which {max(tokens, 0)} are to train on; "
                             f"give at least {2 * LANES}.")  # fmt: skip
        _check_columns(store)
        if k > (wide := d_sae or expansion * store.d_in):
            raise ValueError(f"k={k} is more than d_sae={wide}; lower k, or raise expansion.")
        batch_size = batch_size or max(LANES, min(4096, tokens // LANES // LANES * LANES))
        epochs = epochs or min(MOST_EPOCHS, math.ceil(STEPS * batch_size / tokens))
        cfg = _config(
            "config", {"data": "features", "sae": sae if isinstance(sae, str) else "batchtopk"},
            {
                **({} if isinstance(sae, str) else _variant(sae, k)),
                "data.train": str(store.folder), "features": store.kind, "k": k, "expansion": expansion, "d_sae": d_sae,
                "batch_size": batch_size, "seed": seed, "trainer.max_epochs": epochs, "trainer.precision": precision,
                "trainer.devices": devices, "trainer.accelerator": accelerator,
                "trainer.enable_progress_bar": progress, "paths.runs": str(folder / "runs"),
                "paths.stores": str(folder / "stores"), **({} if lr is None else {"optimizer.lr": lr}),
                **{f"loss.{term}": weight for term, weight in (loss or {}).items()},
                **{f"callbacks.{name}": entry for name, entry in map(_entry, callbacks)}, **(settings or {}),
            },
        )  # fmt: skip
        if held_out:
            cfg.data.held_out = val
        else:
            other = _store_of(val, folder, split="val", grid=grid, progress=progress)
            cfg.data.val = cfg.data.test = str(other.folder)
        from sae_lightning.training.fit import train  # with Lightning, which takes seconds

        run = train(cfg)
        from sae_lightning.saes import SAE

        return SAE.load(run)


def extract(
    images: Any, backbone: Any = "dinov2", *, features: str = "patch", layer: int | str | None = None,
    labels: Sequence[Any] | None = None, transform: Callable[[Any], Tensor] | None = None, prefix: int = 0,
    split: str = "train", batch_size: int = 64, out: str | Path = ".", settings: Mapping[str, Any] | None = None,
) -> FeatureStore:  # fmt: skip
    """The features of ``images`` as a store below ``out/stores``; one that is there already is opened.

    ``images`` are a list of PIL images, paths or arrays, a data set of (picture, label), a folder of pictures, or the
    name of a config of ``data`` (``"demo"``), whose ``split`` is taken. ``backbone`` is the name of a config
    (``"dinov2"``, ``"clip"``, …), of which ``layer`` is a number, with ``settings`` as for ``extract.py``; or any
    ``nn.Module`` with its ``transform`` from a picture to [3, H, W], of which ``layer`` is a module's path (None: its
    output): [n, d], tokens [n, T, d] with ``prefix`` before the patches, or a map [n, d, h, w].

    Examples:
        >>> store = sae_lightning.extract(["a.jpg", "b.jpg"], "dinov2", layer=10)
        >>> store = sae_lightning.extract(dataset, torchvision.models.resnet18(), layer="layer3", transform=transform)

    DataError, BackboneError or StoreError in one sentence for what cannot be read or encoded.
    """
    from torch.nn import Module

    stores = Path(out).expanduser().absolute() / "stores"
    if isinstance(backbone, Module):
        pictures = _pictures(images, labels, split)
        from sae_lightning.features.modules import extract_module

        return extract_module(pictures, backbone, layer, transform, prefix, batch_size, stores, split)
    from sae_lightning.features.source import Source, extract_stores

    known = isinstance(images, str) and not Path(images).exists()
    folder = None if known or not isinstance(images, str | Path) else Path(images).absolute()
    cfg = _config(
        "extract", {"backbone": backbone, "data": images if known else "folder"},
        {"features": features, "extract.batch_size": batch_size, "paths.stores": str(stores),
         **({} if known else {"data.path": str(folder or ".")}),
         **({} if layer is None else {"backbone.layer": layer}), **(settings or {})},
    )  # fmt: skip
    source = Source.of(cfg)
    found = source.images(split) if known or folder else _pictures(images, labels, split)
    return source.open(extract_stores(source, found, [source.tap])[source.tap])


def _pictures(images: Any, labels: Sequence[Any] | None, split: str) -> ImageData:
    from sae_lightning.data.given import given_images

    if isinstance(images, str | Path):
        raise ValueError(f"images={images} with a module of your own: give the pictures as a list or a data set.")
    return given_images(images, labels, split=split)


def evaluate(
    sae: SAE | str | Path, store: FeatureStore | None = None, metrics: str | Sequence[str] = "core", *,
    split: str = "test", settings: Mapping[str, Any] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """The scores of an SAE, a row each: ``metric``, ``setting``, ``value``, its interval from ``low`` to ``high``, and
    ``why`` there is none.

    ``sae`` is the folder of a run, whose ``split`` is scored and which keeps the scores; or an SAE that is scored on
    ``store``, of which nothing stays. ``metrics`` is ``"core"``, ``"visaebench"``, or names of parts
    (``["moran", "cknna"]``); ``settings`` are any others of ``evaluate.py`` by their dotted names.

    Examples:
        >>> scores = sae_lightning.evaluate(sae, store, ["moran"])
        >>> scores.set_index("metric").loc["explained_variance", "value"]

    ValueError, StoreError or ArtefactError in one sentence for what cannot be scored.
    """
    import glob

    import pandas as pd

    from sae_lightning.evaluation.suite import evaluate as evaluated
    from sae_lightning.runs.importing import run_on
    from sae_lightning.runs.scores import read_rows

    names = [metrics] if isinstance(metrics, str) else list(metrics)
    whole = names[0] if isinstance(metrics, str) else "visaebench"
    with _folder(None) as made:
        if isinstance(sae, str | Path):
            run = Path(sae).expanduser().absolute()
        elif store is None:
            raise ValueError("An SAE needs a store of features to be scored on; a run's folder brings its own.")
        else:
            run = run_on(sae, _whole(store, made), made / "runs")
        cfg = _config(
            "evaluate", {"metrics": whole},
            {"runs": glob.escape(run.name), "paths.runs": str(run.parent), "split": split, **(settings or {})},
        )  # fmt: skip
        if not isinstance(metrics, str):
            unknown = [name for name in names if name not in cfg.metrics]
            if unknown:
                raise ValueError(f"There is no metric {unknown[0]}; there are {', '.join(cfg.metrics)}.")
            for name in [name for name in cfg.metrics if name not in ("core", "protocol", *names)]:
                cfg.metrics[name] = None
        evaluated(cfg)
        rows = [row for row in read_rows(run) if row["split"] == split]
    columns = ["part", "metric", "setting", "value", "low", "high", "n", "why"]
    return pd.DataFrame(rows).reindex(columns=columns)


def list_runs(folder: str | Path = "runs", pattern: str = "*") -> pd.DataFrame:
    """The finished runs below ``folder``, a row each, by name: what they are, and a column a score.

    Columns are variant, backbone, layer, features, data, k, expansion, d_sae, seed and folder, then ``val/…`` as
    training left them, then the scores of ``evaluate.py``, called by metric and setting.

    Examples:
        >>> sae_lightning.list_runs().sort_values("val/explained_variance")

    FileNotFoundError where there is none.
    """
    import pandas as pd

    from sae_lightning.runs.run import Run, find_runs

    rows = []
    for run in map(Run, find_runs(pattern, Path(folder).expanduser())):
        about = ("variant", "backbone", "layer", "features", "data", "k", "expansion", "d_sae", "seed")
        row: dict[str, Any] = {"run": run.name} | {name: run.cfg.get(name) for name in about}
        row["folder"] = str(run.folder)
        row |= {f"val/{name}": value for name, value in run.result.get("val", {}).items()}
        rows.append(row | {f"{r['metric']} {r['setting']}".strip(): r["value"] for r in run.rows})
    return pd.DataFrame(rows).set_index("run")


def compare(first: str | Path, second: str | Path, folder: str | Path = "runs") -> pd.DataFrame:
    """Two runs side by side, by folder or name: the settings in which they differ, then their scores.

    Examples:
        >>> sae_lightning.compare("batchtopk-…", "topk-…")
    """
    import pandas as pd

    from sae_lightning.runs.state import differences

    paths = [Path(name) if Path(name).is_dir() else Path(folder) / name for name in (first, second)]
    tables = [list_runs(path.absolute().parent, path.name) for path in paths]
    told = {each.setting: (each.first, each.second) for each in differences(*paths) if each.reason is None}
    columns = [c for c in tables[0].columns if c in tables[1].columns and tables[0][c].dtype.kind == "f"]
    told |= {c: (tables[0][c].iloc[0], tables[1][c].iloc[0]) for c in columns}
    return pd.DataFrame.from_dict(told, orient="index", columns=[path.name for path in paths])


def _variant(kind: type[SAE], k: float) -> dict[str, Any]:
    """The settings of a variant of the caller's own: its name, and k if it takes one."""
    takes_k = "k" in inspect.signature(kind).parameters
    return {"sae.name": kind.variant, "sae.settings": {"k": k} if takes_k else {}, "loss.aux": 0.0}


def _check_columns(store: FeatureStore) -> None:
    """ValueError where no dimension varies; a warning where some do not."""
    constant = (store.deviation <= 1e-6 * store.deviation.max().clamp_min(1e-12)).nonzero().flatten().tolist()
    if len(constant) == store.d_in or float(store.deviation.max()) == 0:
        raise ValueError("All rows of the features are equal; there is nothing to learn.")
    if constant:
        print(
            f"Warning: {len(constant)} of {store.d_in} dimensions are constant (the first is {constant[0]}); no latent "
            "can say anything of them.", flush=True,
        )  # fmt: skip


@contextmanager
def _folder(out: str | Path | None) -> Iterator[Path]:
    """``out`` as an absolute path, or a folder that is removed at the end."""
    if out is not None:
        yield Path(out).expanduser().absolute()
        return
    with TemporaryDirectory(prefix="sae-lightning-") as made:
        yield Path(made)


def _store_of(
    features: Any, folder: Path, *, labels: Any = None, split: str = "train", grid: Any = None, progress: bool = True
) -> FeatureStore:
    """``features`` as a store in ``folder/stores``, which is there already or made now."""
    from sae_lightning.features.importing import counted, import_features, spooled
    from sae_lightning.features.store import FeatureStore

    if isinstance(features, FeatureStore):
        return _whole(features, folder)
    stores = folder / "stores"
    stores.mkdir(parents=True, exist_ok=True)
    with spooled(features, stores) as (source, own), counted("Writing features", progress) as move:
        return import_features(
            source, stores, labels=own if labels is None else labels, split=split, grid=grid, progress=move, named=True
        )


def _whole(store: FeatureStore, folder: Path) -> FeatureStore:
    """``store``, or where it is a part of one, a store below ``folder/stores`` with these images alone."""
    from sae_lightning.features.importing import import_features, spooled

    if len(store) == store.manifest.n_images:
        return store
    step = max(1, 8192 // store.n_patches)
    parts = (store.features(slice(i, i + step)) for i in range(0, len(store), step))
    (folder / "stores").mkdir(parents=True, exist_ok=True)
    with spooled(parts, folder / "stores") as (x, _):
        return import_features(
            x, folder / "stores", store.backbone, kind=store.kind, layer=store.layer,
            grid=(store.grid[0], store.grid[1]), prefix=store.prefix, ids=store.image_ids,
            labels=[store.class_names[i] for i in store.labels],
            data=store.data, split=store.split, named=True,
        )  # fmt: skip


def _entry(callback: Any) -> tuple[str, dict[str, Any]]:
    """A callback as an entry of the config: its class and the arguments that it was made with."""
    if isinstance(callback, Mapping):
        return str(callback["_target_"]).rpartition(".")[2].lower(), dict(callback)
    kind = type(callback)
    if not hasattr(callback, "on_train_batch_start"):
        raise ValueError(f"{callback!r} is no callback of Lightning's; give one, or a mapping with _target_.")
    names = [name for name in inspect.signature(kind).parameters if name not in ("args", "kwargs")]
    lacking = [name for name in names if not hasattr(callback, name)]
    if lacking:
        raise ValueError(
            f"{kind.__name__} does not keep its argument {lacking[0]}, so that no run could be made anew with it; give "
            f"{{'_target_': '{kind.__module__}.{kind.__qualname__}', …}} instead."
        )
    arguments = {name: getattr(callback, name) for name in names}
    return kind.__name__.lower(), {"_target_": f"{kind.__module__}.{kind.__qualname__}", **arguments}


def _config(name: str, groups: Mapping[str, str], values: Mapping[str, Any]) -> DictConfig:
    """The config that a command would compose from these choices of ``groups`` and ``values`` by dotted name."""
    from hydra.errors import CompactHydraException

    from sae_lightning.commands.sentences import sentence_of
    from sae_lightning.registry import import_plugins
    from sae_lightning.settings.compose import compose_config

    import_plugins()
    try:
        return compose_config([f"{group}={choice}" for group, choice in groups.items()], name, values)
    except CompactHydraException as error:
        raise ValueError(sentence_of(error, "train" if name == "config" else name)) from None
