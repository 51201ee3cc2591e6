"""Seconds of each stage on a number of GPUs: the work over the rates, bound by the slowest of what it needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from experiments.scale import work
from experiments.scale.rates import Rates, cpu_pass
from experiments.scale.work import BACKBONES, CONFIGS, Backbone, Config, Probe

GROUPS = (1, 2, 3, 4, 6, 12)  # jobs into which the configs of a backbone are divided


class Stage(NamedTuple):
    """``needs``: seconds that each resource alone would take; they overlap, so that the largest is the time."""

    name: str
    needs: dict[str, float]

    @property
    def bound(self) -> str:
        return max(self.needs, key=lambda name: self.needs[name])

    @property
    def seconds(self) -> float:
        return self.needs[self.bound]


def nodes(rates: Rates, gpus: int) -> int:
    return math.ceil(gpus / rates["gpus_a_node"].value)


def reading(rates: Rates, gpus: int) -> float:
    """Bytes a second from the file system into the machines of ``gpus``."""
    return min(nodes(rates, gpus) * rates["read_node"].value, rates["read_all"].value)


def writing(rates: Rates, gpus: int) -> float:
    return min(nodes(rates, gpus) * rates["write_node"].value, rates["write_all"].value)


def cores(rates: Rates, gpus: int) -> float:
    """Cores' worth of work that the CPUs beside ``gpus`` do at once."""
    return gpus * rates["cores"].value * rates["core_share"].value


def matmul(rates: Rates) -> float:
    return rates["matmul"].value * rates["matmul_share"].value


def memory(rates: Rates) -> float:
    return rates["memory"].value * rates["memory_share"].value


# --- extraction -------------------------------------------------------------------------------------------------
def extraction(rates: Rates, gpus: int) -> Stage:
    """Patch tokens of ImageNet's train and val images and of M6's data, each backbone in a pass of its own."""
    images = work.TRAIN + work.VAL + work.OTHER_IMAGES
    return Stage("extraction", {
        "decoding (CPU)": len(BACKBONES) * images / (cores(rates, gpus) * rates["decode"].value),
        "encoder (GPU)": sum(images * work.encoder_flop(b) for b in BACKBONES) / (gpus * matmul(rates)),
        "images (disk, network)": len(BACKBONES) * images * work.JPEG / reading(rates, gpus),
        "store (disk, network)": sum(work.store_bytes(b, images) for b in BACKBONES) / writing(rates, gpus),
    })  # fmt: skip


# --- training ---------------------------------------------------------------------------------------------------
def step(rates: Rates, config: Config) -> dict[str, float]:
    """Seconds of the parts of a training step of one SAE on a GPU, one after another."""
    return {
        "product": work.product_flop(config) / matmul(rates),
        "selection": work.selection_bytes(config) / memory(rates),
        "sparse products": work.sparse_bytes(config) / memory(rates),
        "optimiser": work.optimizer_bytes(config) / memory(rates),
        "host": rates["host"].value,
    }


def float32_product(rates: Rates, config: Config) -> float:
    """Seconds of the encoder's product without bf16 autocast."""
    return work.product_flop(config) / (rates["float32"].value * rates["matmul_share"].value)


def dense_alternative(rates: Rates, config: Config) -> float:
    """Seconds of the sparse products if they were dense ones in bfloat16, with the codes written and read thrice."""
    return work.dense_flop(config) / matmul(rates) + 2 * work.selection_bytes(config) / memory(rates)


def dense_from(rates: Rates) -> float:
    """The share k / d_sae of active latents from which these dense products are faster."""
    config = Config(32, 1)
    return dense_alternative(rates, config) / (work.sparse_bytes(config) / memory(rates)) / config.d_sae


def run_seconds(rates: Rates, backbone: Backbone, config: Config) -> float:
    """Of one SAE alone on a GPU, where reading is no bound."""
    return work.steps(backbone) * sum(step(rates, config).values())


def spread(seconds: Sequence[float], places: int) -> list[list[float]]:
    """``seconds`` divided among ``places``: the longest first, each to the place with the least so far."""
    found: list[list[float]] = [[] for _ in range(places)]
    for each in sorted(seconds, reverse=True):
        min(found, key=sum).append(each)
    return found


class Training(NamedTuple):
    """``stage``, with ``groups`` packed jobs a backbone; GPUs ``busy`` seconds, added up; one stream is ``per_stream``
    bytes a second."""

    stage: Stage
    groups: int
    busy: float
    per_stream: float


def training(rates: Rates, gpus: int) -> Training:
    """The sixty SAEs; configs of a backbone in the fewest packed jobs that end within 2 % of the earliest end."""
    found = [_training(rates, gpus, groups) for groups in GROUPS]
    earliest = min(t.stage.seconds for t in found)
    return next(t for t in found if t.stage.seconds <= 1.02 * earliest)


def _training(rates: Rates, gpus: int, groups: int) -> Training:
    jobs, total = [], 0
    for backbone in BACKBONES:
        alone = [run_seconds(rates, backbone, config) for config in CONFIGS]
        jobs += [sum(job) for job in spread(alone, groups)]
        total += groups * work.store_bytes(backbone, work.TRAIN)
    ends = max(sum(place) for place in spread(jobs, gpus))
    used = min(gpus, len(jobs))
    needs = {
        "GPU": ends,
        "store (disk, network)": total / reading(rates, used),
        "loaders (CPU)": total / (used * rates["loader"].value),
    }
    return Training(Stage("training", needs), groups, sum(jobs), total / len(jobs) / (sum(jobs) / len(jobs)))


# --- evaluation -------------------------------------------------------------------------------------------------
def scoring(rates: Rates, gpus: int) -> Stage:
    """One pass of every SAE over the val images and M6's: M1, M2, M5 and the pooled codes, on the CPUs."""
    images = work.VAL + work.OTHER_IMAGES
    core_seconds = sum(
        2 * images * b.patches / 196 * cpu_pass(config.d_sae, config.k) for b in BACKBONES for config in CONFIGS
    )
    read = sum(work.store_bytes(b, images) for b in BACKBONES)
    return Stage(
        "scoring pass",
        {
            "encoding and sums (CPU)": core_seconds / cores(rates, gpus),
            "store (disk, network)": read / reading(rates, gpus),
        },
    )


def probe_on_cpu(rates: Rates, probe: Probe) -> float:
    """Core-seconds of scikit-learn's fit."""
    a, b = rates["probe_a"].value, rates["probe_b"].value
    return probe.iterations * probe.n * probe.classes * (a * probe.d + b)


def probe_on_gpu(rates: Rates, probe: Probe) -> float:
    """Seconds with products in float32 on a GPU, logits passed six times, and L-BFGS-B's ten pairs of float64 vectors
    on the host."""
    weights = (probe.d + 1) * probe.classes
    flop = 4 * probe.n * probe.d * probe.classes / (rates["float32"].value * rates["matmul_share"].value)
    passes = 6 * probe.n * probe.classes * work.FULL / memory(rates)
    return probe.iterations * (flop + passes + 20 * weights * 8 / rates["host_memory"].value)


def all_probes() -> list[Probe]:
    """Of the whole grid: the backbones', and those of sixty SAEs."""
    return len(BACKBONES) * (work.raw_probes() + len(CONFIGS) * work.sae_probes())


def probing(rates: Rates, gpus: int, device: str = "cuda") -> Stage:
    """M3, M4 and M6 (M7's 848 probes of four latents take seconds), spread over GPUs or over the CPUs beside them."""
    if device == "cuda":
        return Stage("probes", {"GPU and host": sum(probe_on_gpu(rates, p) for p in all_probes()) / gpus})
    return Stage("probes", {"CPU": sum(probe_on_cpu(rates, p) for p in all_probes()) / cores(rates, gpus)})


def code_probe(rates: Rates, k: int, n: int, classes: int, iterations: int, spread_over: int = 10) -> float:
    """Seconds on a GPU of a probe of all codes, sparse: an image has ``spread_over`` · k active latents (assumed), each
    of which reads a row of ``classes`` float32 forward and backward."""
    return iterations * 2 * n * spread_over * k * classes * work.FULL / memory(rates)


def plan(rates: Rates, gpus: int) -> list[Stage]:
    """All stages, one after another."""
    return [extraction(rates, gpus), training(rates, gpus).stage, scoring(rates, gpus), probing(rates, gpus)]
