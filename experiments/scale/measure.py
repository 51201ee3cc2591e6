"""What one core does of the work that the model needs and no other benchmark here measures.

    OMP_NUM_THREADS=1 python -m experiments.scale.measure [--json experiments/scale/measured.json]

Seconds are of processor time, so that other work on the machine disturbs them little. Takes a minute.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

MEASURED = Path(__file__).with_name("measured.json")
SHORT, LONG = 2, 7  # iterations of the two fits whose difference is timed


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """The median processor time of ``call``."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return statistics.median(found)


def decoding(quality: int = 96) -> dict[str, float]:
    """Images a second of one core: JPEG of ImageNet's usual 500 × 375 decoded, resized and cropped to 224 × 224."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize(
        (500, 375), Image.Resampling.BICUBIC
    )
    grain = rng.integers(-14, 14, (375, 500, 3))
    picture = Image.fromarray((np.asarray(coarse).astype(int) + grain).clip(0, 255).astype(np.uint8))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)

    def decode() -> None:
        for _ in range(50):
            image = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
            image = image.resize((299, 224), Image.Resampling.BICUBIC).crop((37, 0, 261, 224))
            (np.asarray(image, np.float32) / 255 - 0.5) / 0.25

    return {"bytes": len(file.getvalue()), "images_per_second": 50 / seconds(decode)}


def iteration(n: int, d: int, classes: int) -> float:
    """Seconds of one iteration of a multinomial LogisticRegression on float32 features [n, d]."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % classes
    x = (rng.standard_normal((classes, d))[y] + 2 * rng.standard_normal((n, d))).astype(np.float32)

    def fit(iterations: int) -> None:
        model = LogisticRegression(max_iter=iterations, tol=1e-12).fit(x, y)
        if model.n_iter_[0] != iterations:
            raise RuntimeError(
                f"The solver stopped after {model.n_iter_[0]} of {iterations} iterations; change the task."
            )

    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)
        return (seconds(lambda: fit(LONG)) - seconds(lambda: fit(SHORT))) / (LONG - SHORT)


def probing(n: int = 8000, classes: int = 500) -> dict[str, float]:
    """a and b of the law n · classes · (a · d + b) seconds an iteration, from d = 32 and d = 768."""
    few, many = (iteration(n, d, classes) / (n * classes) for d in (32, 768))
    slope = (many - few) / (768 - 32)
    return {"a": slope, "b": few - 32 * slope}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=MEASURED)
    args = parser.parse_args()
    found = {"machine": "one core, AMD Zen 5", "decoding": decoding(), "probing": probing()}
    args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(args.json.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
