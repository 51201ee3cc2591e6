"""Time, disk and GPU-hours of ViSAEBench's sixty SAEs on ImageNet, from counts and named rates.

    python -m experiments.scale.model [--gpu a100|h100|h200] [--set decode=600 read_all=100e9] [--docs]

Prints the tables of docs/scale.md; ``--docs`` writes them into it. ``work.py`` counts, ``rates.py`` says how fast,
``stages.py`` divides. No GPU has been measured: its rates are data sheets and assumptions, and the last table says
how much each assumption matters.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import fill

from experiments.scale import stages, work
from experiments.scale.rates import GPUS, Rates, cpu_pass, cpu_step, rates
from experiments.scale.work import BACKBONES, CONFIGS, Config

DOCS = Path(__file__).resolve().parents[2] / "docs" / "scale.md"
BEGIN, END = "<!-- tables: python -m experiments.scale.model --docs -->", "<!-- end of tables -->"
SIZES = (1, 8, 64)  # GPUs
SHOWN = (Config(8, 64), Config(8, 256), Config(16, 128), Config(32, 64), Config(32, 256))


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """In Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def clock(seconds: float) -> str:
    """Seconds, minutes, hours or days, in about two digits."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.0f} GB" if count >= 10e9 else f"{count / 1e9:.1f} GB"


def rate_table(known: Rates) -> str:
    rows = [(name, f"{r.value:.3g}", r.unit, r.kind, r.source) for name, r in known.items()]
    return "**Rates**\n\n" + table(["", "", "", "", ""], rows)


def disk_table() -> str:
    images = work.TRAIN + work.VAL
    stores = {b.name: work.store_bytes(b, images) for b in BACKBONES}
    other = sum(work.store_bytes(b, work.OTHER_IMAGES) for b in BACKBONES)
    same = [name for name, size in stores.items() if size == stores["clip"]]
    saes = len(BACKBONES) * sum(work.sae_bytes(config) for config in CONFIGS)
    running = sum(work.training_bytes(config) for config in CONFIGS)
    rows = [
        ("ImageNet's JPEGs", gigabytes(images * work.JPEG), "once"),
        ("store of dinov2, 256 patches", gigabytes(stores["dinov2"]), "train and val, float16"),
        (f"store of {', '.join(same)} each, 196 patches", gigabytes(stores["clip"]), "int8 takes half"),
        ("five stores", gigabytes(sum(stores.values())), "one at a time: extract, train, score, delete"),
        ("M6's data, five stores", gigabytes(other), f"{work.OTHER_IMAGES:,} images"),
        ("sixty SAEs, float32", gigabytes(saes), f"{gigabytes(saes / 60)} each on average"),
        ("on a GPU, twelve packed", gigabytes(running), "weights, gradients, Adam; and 1 GB of activations"),
    ]
    return "**Disk and memory**\n\n" + table(["", "", ""], rows)


def step_table(known: Rates) -> str:
    rows = []
    for config in SHOWN:
        parts = stages.step(known, config)
        total = sum(parts.values())
        rows.append([
            f"×{config.expansion}, k {config.k}", *(f"{1e3 * v:.2f}" for v in parts.values()), f"**{1e3 * total:.1f}**",
            f"{1e3 * stages.dense_alternative(known, config):.2f}", f"{work.BATCH * work.D_IN * 2 / total / 1e9:.1f}",
            f"{1e3 * work.BATCH * cpu_step()(config.d_sae, config.k):,.0f}",
        ])  # fmt: skip
    titles = ["8192 tokens, ms", *stages.step(known, SHOWN[0]), "step", "if dense", "reads GB/s", "2 cores"]
    share, widest = 100 * stages.dense_from(known), 100 * max(c.k / c.d_sae for c in CONFIGS)
    single = 1e3 * stages.float32_product(known, CONFIGS[-1])
    said = (
        "Columns add up to the step; `host` is Python and kernel launches. `if dense` is what sparse products would "
        f"take as dense bfloat16 ones: less from k / d_sae = {share:.1f} % on. The code goes dense, in float32, from "
        f"10 % on, a guess; this grid ends at {widest:.1f} %. Without bf16 autocast the product of ×32 takes "
        f"{single:.0f} ms. `reads GB/s` is what an SAE that trains alone takes from its stream; `2 cores` is the law "
        "of the table without a GPU."
    )
    return f"**A training step**\n\n{table(titles, rows)}\n\n{fill(said, 120)}"


def plan_table(known: Rates) -> str:
    plans = {gpus: stages.plan(known, gpus) for gpus in SIZES}
    rows = []
    for one, *others in zip(*plans.values(), strict=True):
        rows.append([one.name, *(f"{clock(s.seconds)}, {s.bound}" for s in (one, *others))])
    whole = {gpus: sum(s.seconds for s in plan) for gpus, plan in plans.items()}
    rows.append(["**all**", *(f"**{clock(s)}**" for s in whole.values())])
    rows.append(["GPU-hours held", *(f"{gpus * s / 3600:.0f}" for gpus, s in whole.items())])
    trained = {gpus: stages.training(known, gpus) for gpus in SIZES}
    rows.append([
        "GPU-hours of training, busy of held",
        *(f"{t.busy / 3600:.1f} of {gpus * t.stage.seconds / 3600:.1f}" for gpus, t in trained.items()),
    ])  # fmt: skip
    rows.append(["packed jobs a backbone", *(f"{t.groups} of {12 // t.groups} SAEs" for t in trained.values())])
    rows.append(["a job reads", *(f"{t.per_stream / 1e9:.2f} GB/s" for t in trained.values())])
    return "**The plan, and what bounds each stage**\n\n" + table(
        ["", *(f"{n} GPU{'s' * (n > 1)}" for n in SIZES)], rows
    )


def needs_table(known: Rates) -> str:
    """What each resource alone would take, on eight GPUs."""
    rows = [
        (stage.name, ", ".join(f"{name} {clock(s)}" for name, s in sorted(stage.needs.items(), key=lambda n: -n[1])))
        for stage in stages.plan(known, 8)
    ]
    return "**What each resource alone would take, on 8 GPUs**\n\n" + table(["", ""], rows)


def evaluation_table(known: Rates) -> str:
    """Where probes run, and those that M1–M7 do not need."""
    rows = [["M3, M4, M6 on GPUs", *(clock(stages.probing(known, n).seconds) for n in SIZES)]]
    rows.append(["the same on the cores beside them", *(clock(stages.probing(known, n, "cpu").seconds) for n in SIZES)])
    inat = next(o for o in work.OTHERS if o.name == "inaturalist")
    codes = [
        ("M3's probe of all codes (metrics.preservation.codes)", work.VAL * 4 // 5, work.CLASSES, 1000),
        ("M6's probe of all codes on iNaturalist", inat.train, inat.classes, 500),
    ]
    for name, n, classes, iterations in codes:
        whole = len(BACKBONES) * sum(stages.code_probe(known, c.k, n, classes, iterations) for c in CONFIGS)
        rows.append([f"{name}: not in M1–M7", *(clock(whole / gpus) for gpus in SIZES)])
    said = (
        "Every probe takes all of its 500 or 1000 iterations; of all codes, an image has 10 k active latents (assumed)."
    )
    return "**Probes**\n\n" + table(["", *(f"{n} GPU{'s' * (n > 1)}" for n in SIZES)], rows) + f"\n\n{said}"


def cpu_table() -> str:
    """Without a GPU, from measured rates alone."""
    train = {b: [work.steps(b) * work.BATCH * cpu_step()(c.d_sae, c.k) for c in CONFIGS] for b in BACKBONES}
    images = work.VAL + work.OTHER_IMAGES
    passes = sum(images * b.patches / 196 * cpu_pass(c.d_sae, c.k) for b in BACKBONES for c in CONFIGS)
    clip = train[BACKBONES[1]]
    rows = [
        ("one SAE of 196 patches, ×8 k 64 to ×32 k 256", f"{clock(min(clip))} to {clock(max(clip))}"),
        ("twelve SAEs of 196 patches, one after another", clock(sum(clip))),
        ("sixty SAEs", clock(sum(map(sum, train.values())))),
        ("scoring pass of sixty SAEs", clock(passes)),
    ]
    law = f"Steps by a law fitted to the recorded ones, off by {100 * cpu_step().worst:.0f} % at worst."
    return f"**Two cores, no GPU** (AMD Zen 5, measured steps and passes)\n\n{table(['', ''], rows)}\n\n{law}"


def sensitivity_table(gpu: str, **changes: float) -> str:
    """Hours on eight GPUs when a rate is half or twice what was taken."""
    known = rates(gpu, **changes)
    rows = []
    for name, rate in known.items():
        if name == "gpus_a_node":
            continue
        half, twice = (_hours(rates(gpu, **(changes | {name: rate.value * factor}))) for factor in (0.5, 2))
        if f"{half:.1f}" != f"{twice:.1f}":
            rows.append((name, rate.kind, f"{half:.1f} h", f"{twice:.1f} h"))
    rows.sort(key=lambda row: -abs(float(row[2][:-2]) - float(row[3][:-2])))
    return (
        f"**8 GPUs when a rate is half, or twice, that** ({_hours(known):.1f} h as it is; others change nothing)\n\n"
        + table(["", "", "half", "twice"], rows)
    )


def kinds_line(gpu: str, **changes: float) -> str:
    """All stages on eight GPUs of each kind."""
    given = {name: value for name, value in changes.items() if name not in ("matmul", "float32", "memory")}
    whole = {kind: 3600 * _hours(rates(kind, **given)) for kind in GPUS}
    others = ", ".join(f"{kind.upper()} {clock(seconds)}" for kind, seconds in whole.items() if kind != gpu)
    return f"GPUs are {gpu.upper()}. All on eight of another kind: {others} (the paper used eight H200)."


def _hours(known: Rates) -> float:
    return sum(stage.seconds for stage in stages.plan(known, 8)) / 3600


def tables(gpu: str = "h100", **changes: float) -> str:
    """All tables, in Markdown."""
    known = rates(gpu, **changes)
    return "\n\n".join([
        plan_table(known), kinds_line(gpu, **changes), needs_table(known),
        step_table(known), evaluation_table(known), disk_table(), cpu_table(),
        rate_table(known), sensitivity_table(gpu, **changes),
    ])  # fmt: skip


def put(text: str, made: str) -> str:
    """``text`` with ``made`` between the marks."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--set", nargs="*", default=[], metavar="RATE=VALUE", help="replace rates by name")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/scale.md")
    args = parser.parse_args()
    try:
        changes = {name: float(value) for name, _, value in (each.partition("=") for each in args.set)}
        made = tables(args.gpu, **changes)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    print(made)
    if args.docs:
        DOCS.write_text(put(DOCS.read_text(encoding="utf-8"), made), encoding="utf-8")


if __name__ == "__main__":
    main()
