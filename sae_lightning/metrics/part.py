"""What a metric contributes to an evaluation: its part, the columns that show it, and the run it is computed of."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
from omegaconf import DictConfig, OmegaConf
from scipy.sparse import csr_matrix
from torch import Tensor

from sae_lightning.features.source import Source
from sae_lightning.features.store import FeatureStore
from sae_lightning.metrics.base import Score, SumMetric
from sae_lightning.metrics.protocols import CHOICES, PAPER, protocols_of
from sae_lightning.registry import Registry, discover, import_plugins
from sae_lightning.rendering.table import Cell, Head, Measured, Spread, Unknown
from sae_lightning.saes.sae import SAE, Normalizer

if TYPE_CHECKING:
    from sae_lightning.data.masks import Masks

T = TypeVar("T")
M = TypeVar("M", bound=SumMetric)
Options = Mapping[str, Any]

MAIN = "main"  # the pass over the run's own data; those over other data sets are called "<set>/<split>"
CORE = "core"  # the part that comes first
INPUTS = ("raw", "reconstruction", "codes")  # of which downstream tasks are scored


# --- what shows a metric ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Column:
    """A figure as tables show it: a ``metric`` in a ``setting``, over that of ``per`` where given, in a ``form``.

    ``better`` says whether more is better (None marks no best value), ``over`` is a heading above several columns,
    ``about`` a tooltip. In a setting ``{k}`` stands for each value found there, as it does in the titles, and
    ``data=*`` for all data sets, whose values are averaged, unless there is one in the setting ``first``, which then
    stands alone. ``spread`` is the metric that is its standard deviation, shown after ±.
    ``headline`` is its id among the headlines of its ``protocol``, such as ``M1``; with ``always`` it
    stands beside them. ``table`` is the table of details that it is in, by default its part's.
    """

    title: str
    metric: str
    setting: str = ""
    better: bool | None = None
    form: str = ".3f"
    over: str = ""
    about: str = ""
    per: str = ""
    headline: str = ""
    always: bool = False
    table: str = ""
    first: str = ""
    protocol: str = PAPER
    spread: str = ""

    def filled(self, key: str, value: str) -> Column:
        """The column at one value of a placeholder."""
        title, setting, over = (text.replace(f"{{{key}}}", value) for text in (self.title, self.setting, self.over))
        return replace(self, title=title, setting=setting, over=over)

    @property
    def head(self) -> Head:
        """How tables show it."""
        return Head(self.title, self.form, self.better, self.over, about=self.about)

    def of(self, rows: Iterable[Mapping[str, Any]]) -> float:
        """Its value among a run's ``rows`` of one split, without that of ``per``; NaN where there is none."""
        found = [r["value"] for r in self._rows(rows)]
        return float(np.mean(found)) if found else float("nan")

    def why(self, rows: Iterable[Mapping[str, Any]]) -> str:
        """Why its value is NaN; nothing where there is no such row."""
        return next((r.get("why") or "" for r in self._rows(rows) if not math.isfinite(r["value"])), "")

    def cell(self, rows: Sequence[Mapping[str, Any]], value: float | None = None) -> Cell:
        """Its ``value``, by default ``of`` the rows, as tables show it: with its interval, or why there is none."""
        value, same = self.of(rows) if value is None else value, self._rows(rows)
        if not math.isfinite(value):
            return Unknown(self.why(rows) if same else "not scored, or not of such features")
        if self.spread and (deviation := replace(self, metric=self.spread).of(rows)) >= 0:
            return Spread(value, deviation)
        sure = same[0] if len(same) == 1 and not self.per else {}
        if sure.get("low") is None:
            return value
        return Measured(value, sure["low"], sure["high"], sure["n"], sure["unit"])

    def _rows(self, rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Those that it shows: of the ``first`` data set alone where that is among them."""
        found = [r for r in rows if r["metric"] == self.metric and fits(r["setting"], self.setting)
                 and r.get("protocol", PAPER) == self.protocol]  # fmt: skip
        return [r for r in found if r["setting"] == self.first] or found


def fits(setting: str, wanted: str) -> bool:
    """Whether a row's ``setting`` is the ``wanted`` one, or of the data sets that it stands for."""
    return setting == wanted or (wanted.endswith("*") and setting.startswith(wanted[:-1]) and "," not in setting)


def spelled_out(columns: Iterable[Column], found: Collection[tuple[str, str]]) -> list[Column]:
    """``columns`` with each of their placeholders replaced by its values among the ``found`` (metric, setting).

    Numbers ascend, other values keep their order; columns below one heading stay together at each value.
    """

    def key(column: Column) -> tuple[str, str]:
        first = re.search(r"\{(\w+)\}", column.setting)
        return column.over, first[1] if first else ""

    made: list[Column] = []
    for (_, name), group in groupby(columns, key):
        alike = list(group)
        values = [
            match[name] for column in alike if name for metric, setting in found
            if metric == column.metric and (match := _template(column.setting).fullmatch(setting))
        ]  # fmt: skip
        distinct = list(dict.fromkeys(values))
        if all(text.replace(".", "", 1).isdigit() for text in distinct):
            distinct.sort(key=float)
        for value in distinct:
            made += spelled_out([column.filled(name, value) for column in alike], found)
        made += [] if name else alike
    return made


@cache
def _template(text: str) -> re.Pattern[str]:
    """A regular expression with a group for each ``{name}``; ``{input}`` is one of ``INPUTS``."""
    pieces = re.split(r"\{(\w+)\}", text)
    groups = [f"(?P<{name}>{'|'.join(INPUTS) if name == 'input' else '[^,]+'})" for name in pieces[1::2]]
    return re.compile("".join(re.escape(a) + b for a, b in zip(pieces[::2], [*groups, ""], strict=True)))


class Task(NamedTuple):
    """A downstream task of a grid of runs: the ``name`` of its column, and the rows that hold it, by a template each.

    ``Task("segmentation:{data}/{input}", "segmentation_miou", "data={data},input={input}")``.
    """

    name: str
    metric: str
    setting: str

    def column(self, metric: str, setting: str) -> str | None:
        """The column that a row belongs to; None for a row of something else."""
        match = _template(f"{self.metric} {self.setting}").fullmatch(f"{metric} {setting}")
        return match and self.name.format(**match.groupdict())


# --- what a metric is computed of -------------------------------------------------------------------------
class Streamed(NamedTuple):
    """What is known before a pass begins; ``width`` is that of the embeddings that say how alike images are."""

    sae: SAE
    store: FeatureStore
    width: int


class TopImages(NamedTuple):
    """The n images [d_sae, n] int64 on which each latent is strongest, -1 for none, the activations ``values`` there
    (float32, 0 for none), and ``fired`` [d_sae], on how many images it is active."""

    images: Tensor
    values: Tensor
    fired: Tensor


@dataclass(frozen=True)
class ImageFeatures:
    """Features of whole images, the maximum over their patches each, in ``ScoredRun.frame``.

    ``raw`` and ``reconstruction`` [n, d_in] float32, ``codes`` [n, d_sae] float32, ``labels`` [n] int64.
    """

    raw: np.ndarray
    reconstruction: np.ndarray
    codes: csr_matrix
    labels: np.ndarray
    class_names: list[str]


class Dictionary(NamedTuple):
    """``decoder`` and ``encoder`` [d_sae, d_in] of an SAE, and which latents are ``alive`` [d_sae]."""

    decoder: Tensor
    encoder: Tensor
    alive: Tensor


class ScoredRun(Protocol):
    """A run after its passes, as parts see it. A store's or pass's name is ``MAIN``, or ``<set>/<split>``."""

    @property
    def folder(self) -> Path:
        """The run's folder."""

    @property
    def device(self) -> str:
        """Where products are computed."""

    @property
    def source(self) -> Source:
        """Its encoder and its data."""

    @property
    def sae(self) -> SAE:
        """The SAE, on the CPU."""

    @property
    def frame(self) -> Normalizer:
        """The normaliser, by the statistics of the scored store, of the space in which features are compared."""

    @property
    def labelled(self) -> bool:
        """Whether the images have classes."""

    def store(self, name: str = MAIN) -> FeatureStore:
        """The features that a pass reads."""

    def metric(self, name: str, kind: type[M]) -> M:
        """What a part ``streams`` under ``name``, after the pass over the run's own data."""

    def top(self, n: int) -> TopImages:
        """The ``n`` strongest images of each latent."""

    def images(self, name: str = MAIN, pool: str = "max") -> ImageFeatures:
        """Whole images, of a part that needs ``images``; features by their ``mean``, of one that needs ``means``."""

    def texts(self) -> ImageFeatures | None:
        """The captions of the images, in their order, through the text tower and the SAE; None without captions."""

    def masks(self, name: str) -> tuple[Masks, Masks]:
        """Masks of the train and the test images of the data set ``name``."""

    def embeddings(self, part: str) -> Tensor:
        """Embeddings [n, d] float32 of all images by the similarity encoder of a part."""

    def batches(self, title: str) -> Iterator[Tensor]:
        """The features [n, P, d_in] of all images, some at a time, with a progress bar."""

    def sibling_groups(self, released: bool = False) -> Mapping[str, Sequence[str | int]]:
        """Groups of classes that are siblings; of ImageNet's those of the ``released`` package, if asked for."""

    def siblings(self) -> list[Dictionary]:
        """Dictionaries of the runs that differ from this one by their seed alone, for a part that needs them."""

    @property
    def dictionary(self) -> Dictionary:
        """Its own."""

    def shared(self, name: str, make: Callable[[], T]) -> T:
        """What ``make`` gives for the features, made once for all of their runs."""

    def unfinished(self, name: str, options: Options) -> Path:
        """A file for what a part has found so far with its ``options``; it stays until all parts are done."""

    def summary(self, anew: bool = False) -> dict[str, Any]:
        """scores.json; it and the files on single latents are written at the first call, ``anew`` if asked for."""

    def write_latents(self, tensors: Mapping[str, Tensor]) -> None:
        """Add figures [d_sae] to those of the single latents."""


# --- the part ---------------------------------------------------------------------------------------------
def everywhere(config: DictConfig) -> bool:
    """Of every run."""
    return True


def on_patches(config: DictConfig) -> bool:
    """Of runs on patch tokens."""
    return config.get("features", "patch") in ("patch", "tokens")


def nothing(about: Streamed, options: Options) -> dict[str, SumMetric]:
    """No sums."""
    return {}


@dataclass(frozen=True)
class Part:
    """``compute(run, options)`` gives scores that are computed and written together, under the name ``metrics.<name>``.

    ``streams(about, options)`` makes the metrics that a pass over the run's data feeds, by names that parts share.
    ``needs`` are of ``images`` (features and codes of whole images) and ``means`` (features averaged over patches,
    too), ``labels`` (else a row says that there are none), ``core`` (what ``summary`` is made of), ``siblings`` (runs
    that differ by seed: it is computed last), and ``sets``: then the options name data sets below ``sets``, for each of
    which there is a part ``<name>/<set>``, with the set's name in the option ``name``; with ``images`` these are
    streamed, else read by the part itself (``train``: their train images alone).

    Under another ``protocol`` it is the part ``<name>@<protocol>`` of that one's options (``metrics.protocols``), with
    the fields ``otherwise`` in place of its own; a part that has no options there is the same under all of them.

    ``applies`` says of which runs (by their config) it is; ``leaves`` names what it writes into latents.safetensors;
    ``encoder`` gives the arguments of its ``SimilarityEncoder``, if any, of which the options ``apart`` are the
    choice. ``undefined`` says why a figure is NaN, where the score itself does not. ``columns`` stand in the table
    ``title``, with a sentence ``about`` it; ``tasks`` are its downstream tasks.
    """

    name: str
    compute: Callable[[ScoredRun, Options], list[Score]]
    streams: Callable[[Streamed, Options], Mapping[str, SumMetric]] = nothing
    needs: tuple[str, ...] = ()
    applies: Callable[[DictConfig], bool] = everywhere
    columns: tuple[Column, ...] = ()
    tasks: tuple[Task, ...] = ()
    title: str = ""
    about: str = ""
    leaves: tuple[str, ...] = ()
    encoder: Callable[[DictConfig, Options], Mapping[str, Any]] | None = None
    apart: tuple[str, ...] = ()
    undefined: str = "there is nothing to compute it from"
    options: Options = field(default_factory=dict)
    data: str = ""  # the data set that it is of, where it needs sets
    protocol: str = PAPER
    otherwise: Mapping[str, Any] = field(default_factory=dict)

    def asked(self, given: Any, protocol: str = PAPER) -> list[Part]:
        """The part with the options ``given`` in a config (or ``true``); of each data set, where it needs sets."""
        options = ({} if given is True else plain(given)) | CHOICES[protocol].get(self.name, {})
        part, end = self, ""
        if protocol != PAPER:
            part, end = replace(self, protocol=protocol, **self.otherwise), f"@{protocol}"
        if "sets" not in self.needs:
            return [replace(part, name=self.name + end, options=options)]
        sets, without = options.pop("sets", {}), options.pop("without", ())
        return [
            replace(part, name=f"{self.name}/{name}{end}", options=options | {"data": data}, data=name)
            for name, data in sets.items() if name not in without
        ]  # fmt: skip

    @property
    def base(self) -> str:
        """Its name without the protocol's."""
        return self.name.partition("@")[0]

    def is_of(self, config: DictConfig) -> bool:
        """Whether it is of a run with this ``config``: on features, and a size of backbone, that it is for."""
        sized = not self.data or config.backbone.size == self.options["data"]["backbones"]
        return sized and self.applies(config)

    @property
    def keyed(self) -> dict[str, Any]:
        """The options that scores depend on, beside the similarity encoder; those that are null are as if not there."""
        return {name: value for name, value in self.options.items() if name not in self.apart and value is not None}

    @property
    def passes(self) -> tuple[str, ...]:
        """The passes that gather what it needs."""
        if self.data:
            return self._sets if "images" in self.needs else ()
        return (MAIN,) if "images" in self.needs or self.streams is not nothing else ()

    @property
    def reads(self) -> tuple[str, ...]:
        """The stores of data sets that it is computed from."""
        return self._sets if self.data else ()

    @property
    def _sets(self) -> tuple[str, ...]:
        train = f"{self.data}/train"
        return (train,) if "train" in self.needs else (train, f"{self.data}/test")

    def scores(self, run: ScoredRun) -> list[Score]:
        """The scores of ``run``, those that are NaN with the reason; a row that says so where it has none."""
        given = Given(self.base, {**self.options, "name": self.data} if self.data else self.options)
        undefined = self.undefined.format_map(given)
        if "labels" in self.needs and not run.labelled:
            return [Score(f"{self.base}_left_out", 1, why="the images have no classes")]
        found = self.compute(run, given)
        found = found or [Score(f"{self.base}_left_out", 1, why=undefined)]
        return [s if s.why or not math.isnan(s.value) else s._replace(why=undefined) for s in found]


class Given(dict[str, Any]):
    """The options that a config gives to ``part``; ValueError for one that is asked for and not there."""

    def __init__(self, part: str, options: Options) -> None:
        super().__init__(options)
        self.part = part

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"metrics.{self.part} has no {name}; add it as conf/metrics/visaebench.yaml has it.")


def plain(node: Any) -> dict[str, Any]:
    """A config node's content, its interpolations unresolved."""
    return dict(OmegaConf.to_container(node, resolve=False)) if OmegaConf.is_config(node) else dict(node or {})  # type: ignore[arg-type]


# --- all parts --------------------------------------------------------------------------------------------
PARTS: Registry[Part] = Registry("metrics")


def register(part: Part) -> Part:
    """``part``, known from now on by its name."""
    return PARTS.add(part.name, part)


def all_parts() -> list[Part]:
    """The parts of this folder's files, and those that others have registered: core, then all by name."""
    discover("sae_lightning.metrics")
    return sorted(PARTS.values(), key=lambda part: (part.name != CORE, part.name))


def parts_of(metrics: Mapping[str, Any]) -> list[Part]:
    """The parts that a config names, in its order but core first, under each protocol that it asks for.

    Core, and parts that are the same under all protocols, are there once. ValueError for one that is unknown.
    """
    known = [part.name for part in all_parts()]
    protocols, metrics = protocols_of(metrics), {name: metrics[name] for name in metrics if name != "protocol"}
    if any(name not in PARTS for name in metrics):
        import_plugins()
    unknown = [str(name) for name in metrics if name not in PARTS]
    if unknown:
        raise ValueError(f"Unknown metrics.{unknown[0]}; the parts are {', '.join(known)}.")
    wanted = sorted((name for name in metrics if metrics[name] not in (None, False)), key=lambda name: name != CORE)

    def under(name: str) -> list[str]:
        apart = [protocol for protocol in protocols if protocol != PAPER and name in CHOICES[protocol]]
        return [PAPER, *apart] if PAPER in protocols or name == CORE or not apart else apart

    return [part for name in wanted for protocol in under(name) for part in PARTS[name].asked(metrics[name], protocol)]


def headlines(protocol: str = PAPER) -> list[Column]:
    """The headlines of all parts under a protocol by their ids: M1, M2, …; the title begins with the id."""
    found = [c for part in all_parts() for c in part.columns if c.headline and c.protocol == protocol]
    return sorted(found, key=lambda c: (len(c.headline), c.headline))


def downstream() -> list[Task]:
    """The downstream tasks of all parts."""
    return [task for part in all_parts() for task in part.tasks]
