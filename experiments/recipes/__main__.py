"""The papers' recipes on real features: trains and scores what is missing, then writes the tables.

    python -m experiments.recipes DATA ENCODERS [--stores stores] [--runs runs/recipes] [--seeds 0 1 2]

DATA is the folder of the photographs (train.parquet, validation.parquet), ENCODERS that of ``efficientnet_lite0`` and
``dinov2_s_saliency``. Killed, the same line goes on where it was; ``--table`` writes the tables of what is there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.recipes.plan import SEEDS, SETS, Planned, planned
from experiments.recipes.run import Places, finished
from experiments.recipes.table import collect, write

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("encoders", type=Path)
    parser.add_argument("--stores", type=Path, default=Path("stores"))
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--starts", action="store_true", help="the table of starts and projection instead")
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args()
    lies = Places(args.data, args.encoders, args.stores, args.runs)
    plan = planned(tuple(args.seeds), tuple(args.sets), args.starts)
    done: list[tuple[Planned, Path]] = []
    for some in finished(plan, lies, train=not args.table):
        done += some
        if not args.table:
            print(f"{some[0][0].features}, seed {some[0][0].seed}: done.", flush=True)
            write(collect(done), args.out, args.starts)
    write(collect(done), args.out, args.starts)


if __name__ == "__main__":
    main()
