"""Settings that do not go together: what each rule reads, and the sentence that it gives where they clash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sae_lightning.settings.kinds import registered
from sae_lightning.settings.table import COMMON, VARIANTS

Combination = tuple[tuple[str, ...], Callable[..., str | None]]
TINY_WIDTH, WIDEST = 128, 16384  # d_in of the bundled encoders; no encoder is wider than the second
TIMM_WIDTHS = {"tiny": 192, "small": 384, "base": 768, "large": 1024}  # of vision transformers by their name


def width(backbone: Any, features: Any) -> int | None:
    """d_in as far as the config tells it, without loading an encoder."""
    if backbone.get("size") == "tiny":
        return TINY_WIDTH
    published = backbone.get("published") or {}
    size = next(
        (size for name, size in TIMM_WIDTHS.items() if str(published.get("model")).startswith(f"vit_{name}_")), None
    )
    return size if features in ("patch", "cls", "pooled") else None


def _k(k: Any, d_sae: Any, expansion: Any, sae: Any, backbone: Any, features: Any) -> str | None:
    settings, name = sae.get("settings") or {}, sae.get("name")
    used = settings.get("k", sae.get("target_l0"))
    if used is None:
        return f"sae.name={name} needs k, the number of active latents a token." if "k" in settings else None
    if not isinstance(used, int | float):
        return None
    if settings.get("k_per") == "batch":
        return None
    d_in = width(backbone, features)
    most = d_sae or expansion * (d_in or WIDEST)
    if used > most:
        made = (
            f"d_sae={d_sae}"
            if d_sae
            else f"expansion={expansion} gives at most {most}" + (f" (of {d_in} dimensions)" if d_in else "")
        )
        return f"k={used} must not be above the number of latents, but {made}; lower k or raise expansion."
    return None


def _memory(d_sae: Any, expansion: Any, backbone: Any, features: Any) -> str | None:
    import psutil

    d_in = width(backbone, features)
    if d_in is None:
        return None
    needed, there = 8 * d_in * (d_sae or expansion * d_in), psutil.virtual_memory().total
    if needed > there:
        return (
            f"{'d_sae' if d_sae else 'expansion'}={d_sae or expansion} makes weights of {needed / 2**30:,.0f} GiB, and "
            f"this machine has {there / 2**30:,.0f} GiB of memory; lower it."
        )
    return None


def ranks_of(devices: Any, nodes: Any) -> int | None:
    """Processes that ``trainer.devices`` asks for; None where that depends on the machine."""
    if devices in (-1, "-1", "auto"):
        return None
    listed = str(devices).split(",") if isinstance(devices, str) and "," in devices else devices
    return (len(listed) if isinstance(listed, list) else int(listed)) * int(nodes or 1)


def _lanes(lanes: Any, batch_size: Any, devices: Any, nodes: Any) -> str | None:
    if batch_size % lanes:
        return (
            f"batch_size={batch_size} must be a multiple of the {lanes} lanes of the stream; change it or stream.lanes."
        )
    world = ranks_of(devices, nodes)
    if world and lanes % world:
        return (
            f"trainer.devices={devices} makes {world} processes, which cannot share the {lanes} lanes of the stream "
            "equally; choose a number that divides stream.lanes."
        )
    return None


def _precision(precision: Any) -> str | None:
    if str(precision) == "bf16-true":
        return (
            "trainer.precision=bf16-true keeps weights in bfloat16, whose steps are lost in rounding; "
            "trainer.precision=bf16-mixed is as fast and keeps them in float32."
        )
    return None


def _end(epochs: Any, steps: Any, time: Any) -> str | None:
    if str(epochs) in ("-1", "None") and str(steps) == "-1" and time is None:
        return f"trainer.max_epochs={'null' if epochs is None else epochs} has no end; set it, or trainer.max_steps."
    return None


def _overfit(share: Any) -> str | None:
    return (
        None
        if not share or isinstance(share, int) or share <= 1 or share == int(share)
        else (f"trainer.overfit_batches={share} must be a number of batches, or a share of them up to 1.0.")
    )


def _threshold(threshold: Any, k_per: Any) -> str | None:
    if threshold == "calibrated" and k_per == "batch":
        return "sae.threshold=calibrated needs k a sample; with k_per=batch set sae.threshold=running_average."
    return None


def _steering(target: Any, sparsity: Any) -> str | None:
    if target is not None and not sparsity:
        return f"sae.target_l0={target} steers the weight of the term sparsity; set loss.sparsity above 0."
    return None


def _terms(loss: Any, name: Any, callbacks: Any) -> str | None:
    if name not in VARIANTS:
        return None
    if any(weight for term, weight in loss.items() if term not in COMMON):  # PyTorch is imported only for these
        try:
            registered("sae_lightning.saes.losses:check_terms")(registered("sae_lightning.saes:VARIANTS")[name], loss)
        except ValueError as error:
            return str(error)
    if not any(loss.get(term) for term in ("reconstruction", "absolute", "cosine", "nested")) and not callbacks:
        return "No term of the loss asks for a reconstruction; set loss.reconstruction=1, or absolute, cosine, nested."
    return None


def _ks(name: Any, ks: Any, fractions: Any, d_sae: Any, expansion: Any, backbone: Any, features: Any) -> str | None:
    if isinstance(ks, list) and sorted(set(ks)) != ks:
        return f"sae.settings.ks={ks} must ascend."
    if isinstance(fractions, list) and (sorted(set(fractions)) != fractions or fractions[-1] != 1):
        return f"sae.settings.fractions={fractions} must ascend to 1, for example [0.0625, 0.1875, 0.4375, 1]."
    d_in = width(backbone, features)
    most = d_sae or (expansion * d_in if d_in else None)
    if isinstance(ks, list) and most and ks[-1] > most:
        return f"sae.settings.ks={ks} must not go above the {most} latents; lower them or raise expansion."
    return None


def _schedule(share: Any, start: Any) -> str | None:
    return "schedule.k_share needs schedule.k_from, the k to start at." if share and start is None else None


def _shares(shares: Any, source: Any) -> str | None:
    if (
        source != "folder"
        or not isinstance(shares, dict)
        or not all(isinstance(v, int | float) for v in shares.values())
    ):
        return None
    if set(shares) != {"train", "val", "test"} or abs(sum(shares.values()) - 1) > 1e-6:
        return f"data.shares={shares} must give train, val and test shares that add up to 1."
    return None


def _part(part: Any) -> str | None:
    if part is not None and int(str(part).split("/")[0]) >= int(str(part).split("/")[1]):
        return f"extract.part={part} must look like 0/4, 1/4, 2/4 or 3/4."
    return None


def _contradiction(pretrained: Any, weights: Any, size: Any) -> str | None:
    if size == "published" and pretrained is False and weights is not None:
        return f"backbone.published.weights={weights} and pretrained=false contradict each other; leave one out."
    return None


def _size(size: Any, source: Any) -> str | None:
    if size is not None or source in ("store", "synthetic"):
        return None
    return "backbone.size must be tiny or published; backbone=features alone has none, and takes data=features."


SIZE: Combination = (("backbone.size", "data.source"), _size)
ENCODING: tuple[Combination, ...] = (
    SIZE,
    (("data.shares", "data.source"), _shares),
    (("extract.part",), _part),
    (("backbone.published.pretrained", "backbone.published.weights", "backbone.size"), _contradiction),
)


def _alone(nodes: Any) -> str | None:
    return None if nodes == 1 else f"Fine-tuning works on one node; set trainer.num_nodes=1 (it is {nodes})."


def _shared(batch_size: Any, devices: Any) -> str | None:
    world = ranks_of(devices, 1)
    if world and batch_size % world:
        return f"batch_size={batch_size} must be a multiple of the {world} devices that share it."
    return None


def _streaming(streaming: Any) -> str | None:
    if streaming:
        return "Fine-tuning shuffles pictures, which a stream cannot; set data.streaming=false."
    return None


def _pictures(source: Any) -> str | None:
    if source == "store":
        return "data=store holds features only; fine-tuning needs pictures, such as data=folder."
    return None


def _app(name: Any, split: Any, app: Any) -> str | None:
    if name == "bias" and split == "train":
        return "The classifier is trained on the split train, so it is explained on another; set split=test."
    if name == "stability" and app.get("fit") == split:
        return (
            f"app.fit and split are both {split}; latents must be measured on other images than they were matched on."
        )
    if name == "agreement" and app.get("judgements") is not None and app.get("simulated"):
        return "Both app.judgements and app.simulated are set; people and made-up judges are not mixed."
    return None


COMBINATIONS: dict[str, tuple[Combination, ...]] = {
    "train": (
        *ENCODING,
        (("k", "d_sae", "expansion", "sae", "backbone", "features"), _k),
        (("d_sae", "expansion", "backbone", "features"), _memory),
        (("stream.lanes", "batch_size", "trainer.devices", "trainer.num_nodes"), _lanes),
        (("trainer.precision",), _precision),
        (("trainer.max_epochs", "trainer.max_steps", "trainer.max_time"), _end),
        (("trainer.overfit_batches",), _overfit),
        (("sae.threshold", "sae.settings.k_per"), _threshold),
        (("sae.target_l0", "loss.sparsity"), _steering),
        (("loss", "sae.name", "callbacks"), _terms),
        (
            ("sae.name", "sae.settings.ks", "sae.settings.fractions", "d_sae", "expansion", "backbone", "features"),
            _ks,
        ),
        (("schedule.k_share", "schedule.k_from"), _schedule),
    ),
    "extract": ENCODING,
    "explore": ((("app.name", "split", "app"), _app),),
    "finetune": (
        (("data.shares", "data.source"), _shares),
        (("extract.part",), _part),
        (("data.source",), _pictures),
        (("trainer.precision",), _precision),
        (("trainer.max_epochs", "trainer.max_steps", "trainer.max_time"), _end),
        (("trainer.overfit_batches",), _overfit),
        (("trainer.num_nodes",), _alone),
        (("batch_size", "trainer.devices"), _shared),
        (("data.streaming",), _streaming),
    ),
}  # fmt: skip
