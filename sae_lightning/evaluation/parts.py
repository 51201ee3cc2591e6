"""All parts of the benchmark, in the order of their computation, as the config group ``metrics`` asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from tqdm.auto import tqdm

from sae_lightning.evaluation.evaluated import Evaluated
from sae_lightning.evaluation.scoring_pass import Gather, batches, labelled
from sae_lightning.evaluation.similarity import Judge, Similarity
from sae_lightning.files import write_json, write_tensors
from sae_lightning.metrics import ActivationHistogram, ChannelMoran, MonoScore, probes
from sae_lightning.metrics import absorption as m7
from sae_lightning.metrics import cross_domain as m6
from sae_lightning.metrics import monosemanticity as m5
from sae_lightning.metrics import preservation as m3
from sae_lightning.metrics import retrieval as finding
from sae_lightning.metrics import sparse_probing as m4
from sae_lightning.metrics.base import Score, of_one_rank
from sae_lightning.metrics.cknna import alignment, neighbours
from sae_lightning.metrics.part import MAIN, Part, on_patches, plain
from sae_lightning.metrics.recovery import Recovery, budgets_of, recovery_cknna
from sae_lightning.metrics.segmentation import Probing, segment_raw
from sae_lightning.metrics.segmentation import segmentation as segment
from sae_lightning.runs.run import LATENTS
from sae_lightning.saes import SparseCodes
from sae_lightning.saes.artefact import put_tensors

Options = Mapping[str, Any]

ABSORPTION, HISTOGRAMS = "absorption.json", "histograms.safetensors"

QUANTILES = (0.25, 0.5, 0.75)


def core(run: Evaluated, options: Options) -> list[Score]:
    """FVU, R², cosine, L0, dead latents, MonoScore and purity; scores.json and what belongs to single latents."""
    (run.folder / LATENTS).unlink(missing_ok=True)
    scores = run.summary()
    found = {**scores["metrics"], "l0_share": scores["metrics"]["l0"] / run.sae.d_sae}
    found["dead"] = run.sae.d_sae - scores["metrics"]["alive"]
    found["n_images"], found["n_tokens"] = scores["n_images"], scores["n_tokens"]
    found["similarity_baseline"] = scores["similarity"]["baseline"]
    return of_dict(found)


def moran(run: Evaluated, options: Options) -> list[Score]:
    """M1."""
    run.summary()
    return of_dict(run.passes[MAIN].metrics["moran"].compute())


def raw_moran(run: Evaluated, options: Options) -> list[Score]:
    """Moran's I of the backbone's own channels, once for all of its SAEs."""

    def make() -> list[Score]:
        store = run.store(MAIN)
        metric = of_one_rank(ChannelMoran(store.d_in, store.grid, **options))
        for _, read in batches(store, 0, len(store), max(1, 16384 // store.n_patches), "Moran's I of the features"):
            metric.update(run.frame.normalize(read))
        return of_dict(metric.compute())

    return run.shared("raw_moran", make)


def histograms(run: Evaluated, options: Options) -> list[Score]:
    """Histograms of activations, whole in the run's folder, and their quartiles."""
    metric = run.passes[MAIN].metrics["histograms"]
    assert isinstance(metric, ActivationHistogram)
    found = metric.histograms()
    tensors = {f"{name}.{field}": t for name, h in found.items() for field, t in h._asdict().items()}
    write_tensors(run.folder / HISTOGRAMS, {name: tensor.cpu().clone() for name, tensor in tensors.items()})
    return [
        Score(f"activation_{name}", h.quantile(q), f"quantile={q:g}") for name, h in found.items() for q in QUANTILES
    ]


def monosemanticity(run: Evaluated, options: Options) -> list[Score]:
    """M5, with the score of each latent."""
    done = run.passes[MAIN]
    mono = done.metrics["mono"]
    assert isinstance(mono, MonoScore)
    embeddings = run.shared("embeddings", lambda: _embeddings(run))
    floor = run.shared(
        f"floor {options}", lambda: m5.baseline(embeddings, options["groups"], options["images"], options["seed"])
    )
    latents = m5.choose_live(done.top.peaks(), options["latents"], options["seed"])
    images, strength = (x[latents, : options["images"]] for x in (done.top.images(), done.top.strengths()))
    labels = done.store.labels if labelled(done.store) else None
    found = m5.monosemanticity(images, strength, mono.minimum().cpu()[latents], embeddings, labels)
    nothing = torch.full((run.sae.d_sae,), torch.nan, dtype=torch.float64)
    put_tensors(run.folder / LATENTS, {
        "monosemanticity": nothing.index_put((latents,), found.score),
        "monosemanticity_within_mass": nothing.index_put((latents,), found.within_mass),
    })  # fmt: skip
    return of_dict(m5.summarize(found, floor))


def _embeddings(run: Evaluated) -> torch.Tensor:
    """Embeddings [n, d] float32 of all images by the encoder that judges this backbone."""
    store, other = run.store(MAIN), run.judge("monosemanticity")
    judge, nothing = Judge(store, other), torch.empty(0)
    parts = (slice(i, min(len(store), i + 1024)) for i in range(0, len(store), 1024))
    return torch.cat([judge.embeddings(part, store.features(part) if other is None else nothing) for part in parts])


def of_labelled(compute: Callable[[Evaluated, Options], list[Score]]) -> Callable[[Evaluated, Options], list[Score]]:
    """A row that says so for images without labels."""

    @wraps(compute)
    def scores(run: Evaluated, options: Options) -> list[Score]:
        if labelled(run.store(MAIN)):
            return compute(run, options)
        return [Score(f"{compute.__name__}_left_out", 1, why="the images have no classes")]

    return scores


@of_labelled
def preservation(run: Evaluated, options: Options) -> list[Score]:
    """M3, LP-KL and LP-Acc; the raw probe is fitted once for all SAEs of a backbone."""
    images, fit = run.images(MAIN), _fit(options)
    probe = run.shared(
        f"raw probe {options}",
        lambda: m3.fit_raw(images.raw, images.labels, _split(run, options), **fit, device=run.device),
    )
    codes = images.codes if options["codes"] else None
    scores = m3.preservation(probe, images.reconstruction, images.labels, codes, **fit, device=run.device)
    return [*scores, *_left_out(run, options, "preservation")]


@of_labelled
def sparse_probing(run: Evaluated, options: Options) -> list[Score]:
    """M4 at every budget."""
    images = run.images(MAIN)
    scores = m4.sparse_probing(
        images.codes, images.labels, _split(run, options), options["budgets"], options["ranking"], **_fit(options),
        device=run.device,
    )  # fmt: skip
    return [*scores, *_left_out(run, options, "sparse_probing")]


@of_labelled
def absorption(run: Evaluated, options: Options) -> list[Score]:
    """M7 at every pair of thresholds; its tasks are kept as json."""
    images = run.images(MAIN)
    found = m7.absorption(
        images.codes, images.labels, run.sibling_groups(), images.class_names, _split(run, options), options["alphas"],
        options["betas"], options["min_group"], **_fit(options),
    )  # fmt: skip
    write_json(run.folder / ABSORPTION, [task._asdict() for task in found.tasks])
    return [*found.scores, *_left_out(run, options, "absorption")]


def cross_domain(name: str, run: Evaluated, options: Options) -> list[Score]:
    """M6 on the data set ``name``."""
    train, test, fit = run.images(f"{name}/train"), run.images(f"{name}/test"), _fit(options)
    raw = run.shared(
        f"raw probe {name} {options}",
        lambda: m6.own_accuracy(train.raw, train.labels, test.raw, test.labels, **fit, device=run.device),
    )
    fitted, held = (m6.Part(each.labels, each.reconstruction, each.codes) for each in (train, test))
    codes = options.get("codes", True)
    return m6.cross_domain(name, raw, fitted, held, options["k"], **fit, codes=codes, device=run.device)


@of_labelled
def retrieval(run: Evaluated, options: Options) -> list[Score]:
    """R@k of finding an image of the same class, by raw features, reconstruction and codes."""
    images, at = run.images(MAIN), options["at"]

    def found(features: Any) -> Mapping[int, float]:
        return finding.image_recall(features, images.labels, ks=at, device=run.device)

    raw = run.shared(f"retrieval {at}", lambda: found(images.raw))
    return [
        *(Score("retrieval_reconstruction", value, f"k={k}") for k, value in found(images.reconstruction).items()),
        *finding.lifts("retrieval", raw, found(images.codes)),
    ]


def image_text(run: Evaluated, options: Options) -> list[Score]:
    """R@k between images and their captions: of embeddings, their reconstructions and the codes of both."""
    images, texts, at = run.images(MAIN), run.texts(), options["at"]
    scores = [Score("image_text_pairs", 0 if texts is None else len(texts.labels))]
    if texts is None:
        return scores
    raw, rebuilt, codes = (
        finding.text_recall(getattr(images, kind), getattr(texts, kind), texts.labels, at, run.device)._asdict()
        for kind in ("raw", "reconstruction", "codes")
    )
    for direction in raw:
        scores += [Score(f"{direction}_reconstruction", value, f"k={k}") for k, value in rebuilt[direction].items()]
        scores += finding.lifts(direction, raw[direction], codes[direction])
    return scores


def cknna(run: Evaluated, options: Options) -> list[Score]:
    """Whether images have the same neighbours by codes, and by reconstruction, as by features."""
    images, k = run.images(MAIN), options["k"]
    n = len(images.raw)
    if n <= max(k, 3):
        return [Score("cknna_left_out", 1, why=f"{n} images have no {k} neighbours each")]
    chosen = np.sort(np.random.default_rng(options["seed"]).permutation(n)[: options["samples"]])
    near = run.shared(f"neighbours {options}", lambda: neighbours(torch.from_numpy(images.raw[chosen]), k))
    rebuilt, codes = torch.from_numpy(images.reconstruction[chosen]), SparseCodes.of_csr(images.codes[chosen])
    return [
        Score("cknna", alignment(near, neighbours(codes, k))),
        Score("cknna_reconstruction", alignment(near, neighbours(rebuilt, k))),
        Score("cknna_samples", len(chosen)),
    ]


def recovery(run: Evaluated, options: Options) -> list[Score]:
    """Reconstruction from each token's n strongest latents, of some images."""
    store, sae, budgets = run.store(MAIN), run.sae, options["budgets"]
    rng = np.random.default_rng(options["seed"])
    chosen = np.sort(rng.permutation(len(store))[: options["images"]])
    kept = np.sort(rng.permutation(len(chosen) * store.n_patches)[: options["samples"]])  # tokens for CKNNA
    metric, tokens, seen = of_one_rank(Recovery(sae, budgets, store.mean)), [], 0
    for images in np.array_split(chosen, -(-len(chosen) * store.n_patches // 4096)):
        features = store.features(images).reshape(-1, sae.d_in).float()
        metric.update(sae.encode(features), features)
        first, last = np.searchsorted(kept, (seen, seen + len(features)))
        tokens.append(features[kept[first:last] - seen])
        seen += len(features)
    names = [f"n={budget}" for budget in budgets_of(budgets, sae.d_sae)[:-1]] + ["n=all"]
    found = metric.compute().items()
    scores = [Score(name, float(v), n) for name, values in found for n, v in zip(names, values, strict=True)]
    some = torch.cat(tokens)
    if len(some) > 10:
        near = recovery_cknna(sae.encode(some), run.frame.normalize(some), budgets)
        scores += [Score("recovery_cknna", value, n) for n, value in zip(names, near, strict=True)]
    return scores


def segmentation(name: str, run: Evaluated, options: Options) -> list[Score]:
    """mIoU of linear probes of patch tokens on the data set ``name``."""
    sets, probing = run.masked(name), Probing(**{k: v for k, v in options.items() if k != "data"})
    raw = run.shared(f"segmentation {name} {probing}", lambda: segment_raw(run.frame, sets, probing))
    return segment(run.sae, sets, probing, raw, name, run.frame)


def of_dict(found: Mapping[str, Any]) -> list[Score]:
    """Named figures as scores."""
    return [Score(name, float(value)) for name, value in found.items()]


def _fit(options: Options) -> dict[str, Any]:
    return {"C": options["C"], "max_iter": options["max_iter"]}


def _split(run: Evaluated, options: Options) -> probes.Split:
    """The one split of the images that all probes share; says once which classes are too small for it."""
    share, seed = options["test_share"], options["seed"]

    def make() -> probes.Split:
        images = run.images(MAIN)
        found = probes.split(images.labels, share, seed)
        names = [images.class_names[c] for c in probes.left_out(images.labels, found)]
        if names:
            classes = f"{len(names)} of {len(np.unique(images.labels))} classes"
            say = f"{classes} have too few images for probes and are left out: {listed(names)}."
            tqdm.write(f"{run.store(MAIN).split}: {say}")
        return found

    return run.shared(f"split {share} {seed}", make)


def _left_out(run: Evaluated, options: Options, part: str) -> list[Score]:
    """How many classes have too few images for the probes of ``part``, with their names; nothing where none has."""
    images = run.images(MAIN)
    names = [images.class_names[c] for c in probes.left_out(images.labels, _split(run, options))]
    why = f"too few images of {listed(names)}"
    return [Score(f"{part}_classes_left_out", len(names), why=why)] if names else []


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names as a sentence has them, of many the first ``most``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


SECTIONS = (
    "core", "moran", "raw_moran", "histograms", "monosemanticity", "preservation", "sparse_probing", "absorption",
    "cknna", "retrieval", "image_text", "recovery", "cross_domain", "segmentation", "stability",
)  # fmt: skip

UNDEFINED = {
    "preservation": "the probe of the raw features is never right on the images held out",
    "sparse_probing": "the images held out are of one class",
    "absorption": "no group of sibling classes has {min_group} of them among the images that probes see",
    "cknna": "no image has neighbours to compare",
    "retrieval": "no two images are of one class, or raw features never find one",
}


def parts_of(metrics: DictConfig) -> list[Part]:
    """The parts that ``metrics`` names; ValueError for one that is unknown."""
    unknown = [str(name) for name in metrics if name not in SECTIONS]
    if unknown:
        raise ValueError(f"Unknown metrics.{unknown[0]}; the parts are {', '.join(SECTIONS)}.")
    parts: list[Part] = []
    for name in SECTIONS:
        node = metrics.get(name)
        if node is not None and node is not False and name in MAKERS:
            parts += MAKERS[name]({} if node is True else plain(node))
    return parts


def _core(options: dict[str, Any]) -> list[Part]:
    undefined = "no latent fires on enough images, or the features do not vary"
    return [Part("core", core, options, wants=Gather(), undefined=undefined)]


def _moran(options: dict[str, Any]) -> list[Part]:
    wants = Gather(moran=options)  # core, too: what is written of single latents is written at once
    undefined = (
        f"no latent has {options['min_images']} images with {options['min_active']} active patches and some variance"
    )
    return [Part("moran", moran, options, wants=wants, applies=on_patches, leaves=("moran",), undefined=undefined)]


def _raw_moran(options: dict[str, Any]) -> list[Part]:
    undefined = f"no channel varies on {options['min_images']} images"
    return [Part("raw_moran", raw_moran, options, passes=(), applies=on_patches, undefined=undefined)]


def _histograms(options: dict[str, Any]) -> list[Part]:
    wants, undefined = Gather(core=False, histograms=options), "no latent is active"
    return [Part("histograms", histograms, options, wants=wants, undefined=undefined)]


def _monosemanticity(options: dict[str, Any]) -> list[Part]:
    judges, pairing = options.pop("judges"), options.pop("pairing")
    other, features, store = options.pop("other"), options.pop("features"), options.pop("store")

    def judge(config: DictConfig) -> Similarity:
        if store is not None:
            return Similarity(store=store)
        name = pairing.get(config.backbone.name, other)
        if name not in judges:
            raise ValueError(
                f"metrics.monosemanticity names {name} as the judge of {config.backbone.name}, but not that encoder; "
                f"add +backbone@metrics.monosemanticity.judges.{name}={name}."
            )
        chosen = judges[name]
        return Similarity(chosen and {**chosen, "size": config.backbone.size}, features)

    wants = Gather(top=options["images"])
    leaves = ("monosemanticity",)
    return [
        Part(
            "monosemanticity", monosemanticity, options, wants=wants, leaves=leaves, judge=judge,
            undefined="no latent has two images to compare, or the images have no classes",
        )
    ]  # fmt: skip


def _of_images(name: str, options: dict[str, Any]) -> list[Part]:
    """A part computed from the features of whole images."""
    return [Part(name, globals()[name], options, undefined=UNDEFINED[name].format(**options))]


def _image_text(options: dict[str, Any]) -> list[Part]:
    return [Part("image_text", image_text, options, applies=lambda config: config.features == "embedding")]


def _recovery(options: dict[str, Any]) -> list[Part]:
    return [Part("recovery", recovery, options, passes=())]


def _cross_domain(options: dict[str, Any]) -> list[Part]:
    sets = options.pop("sets", {})
    return [
        Part(
            f"cross_domain/{name}", partial(cross_domain, name), options | {"data": data},
            passes=(f"{name}/train", f"{name}/test"), applies=_of_size(data),
            undefined="the probe of the raw features is never right, or the test images are of one class",
        )
        for name, data in sets.items()
    ]  # fmt: skip


def _segmentation(options: dict[str, Any]) -> list[Part]:
    sets = options.pop("sets", {})
    return [
        Part(
            f"segmentation/{name}", partial(segmentation, name), options | {"data": data}, passes=(),
            reads=(f"{name}/train", f"{name}/test"), applies=_of_size(data, patches=True),
            undefined="the probe of the raw features is never right, or no test pixel has a class",
        )
        for name, data in sets.items()
    ]  # fmt: skip


def _of_size(data: Mapping[str, Any], patches: bool = False) -> Callable[[DictConfig], bool]:
    """Runs on backbones of the size that the data set is for, with ``patches`` those on patch tokens."""
    return lambda config: config.backbone.size == data["backbones"] and (on_patches(config) or not patches)


MAKERS: dict[str, Callable[[dict[str, Any]], list[Part]]] = {
    "core": _core, "moran": _moran, "raw_moran": _raw_moran, "histograms": _histograms,
    "monosemanticity": _monosemanticity, "image_text": _image_text, "recovery": _recovery,
    "cross_domain": _cross_domain, "segmentation": _segmentation,
    **{name: partial(_of_images, name) for name in (
        "preservation", "sparse_probing", "absorption", "cknna", "retrieval"
    )},
}  # fmt: skip
