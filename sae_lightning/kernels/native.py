"""The C functions of ``csrc`` on float32 CPU tensors."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from sae_lightning.files import CacheError, _make_writable, cache_folder
from sae_lightning.kernels.portable import offsets_of

# read with this module, which calls them: an update of both under a running process must not part them
SOURCES = {
    path.name: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).with_name("csrc").glob("*.[ch]"))
}

FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC", "-std=gnu11"]


def _processor() -> str:
    """What the machine code depends on, so that a shared home folder serves nodes with different processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "".join(next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags"))
    except OSError:
        return platform.processor()


def _compile(compiler: str, library: Path) -> None:
    """Build ``library``, with threads if the compiler has OpenMP; OSError says what it complained of."""
    _make_writable(library.parent)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        for name, text in SOURCES.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        files = [str(Path(folder) / name) for name in SOURCES if name.endswith(".c")]
        for threads in ("-fopenmp", "-fopenmp-simd"):
            command = [*compiler.split(), *FLAGS, threads, "-o", str(built), *files, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                os.replace(built, library)
                return
    raise OSError(f"{compiler} says: {' '.join(done.stderr.split())[-300:]}")


def _share_threads() -> None:
    """Let the kernels run on PyTorch's own OpenMP threads: a second pool would wait for the first one's spinning."""
    maps = Path("/proc/self/maps")
    loaded = (
        {line.split(maxsplit=5)[-1].strip() for line in maps.read_text(encoding="utf-8").splitlines()}
        if maps.exists()
        else set()
    )
    for path in sorted(loaded):
        if "torch" in path and Path(path).name.startswith(("libgomp", "libiomp5", "libomp")):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


@cache
def load_native() -> ctypes.CDLL | None:
    """The compiled kernels, or None (with one warning that says why) where they cannot be built.

    ``SAE_LIGHTNING_NATIVE=0`` turns them off.
    """
    if os.environ.get("SAE_LIGHTNING_NATIVE") == "0" or sys.platform == "win32":
        return None
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    made_from = "\n".join([*SOURCES.values(), *FLAGS, _processor(), compiler or ""])
    try:
        library = cache_folder() / f"native-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
        _share_threads()
        with suppress(OSError):  # missing, or cut by a crash
            return ctypes.CDLL(str(library))
        if compiler is None:
            raise OSError("there is no C compiler (cc) on the path")
        _compile(compiler, library)
        return _loaded(library)
    except OSError as error:
        place = isinstance(error, CacheError)
        change = "Set SAE_LIGHTNING_CACHE to a folder that can be written" if place else "Install a C compiler"
        warnings.warn(
            f"The CPU kernels cannot be built ({error}); training on the CPU falls back to PyTorch's operators, "
            f"which are slower. {change}, or set SAE_LIGHTNING_NATIVE=0 to silence this.",
            stacklevel=2,
        )
        return None


def _loaded(library: Path) -> ctypes.CDLL:
    """A library that was just built; CacheError where its folder's file system lets nothing be executed."""
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise CacheError(f"cannot execute what lies in {library.parent}: {error}") from error


KEPT = 8  # storages of one size that are kept

STALE = 2000  # requests after which a size that nobody asked for is let go

_storages: dict[tuple, list[torch.UntypedStorage]] = {}

_asked: dict[tuple, int] = {}  # number of the last request for each size

_lock = Lock()

_uses = getattr(torch._C, "_storage_Use_Count", None)


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised tensor of ``like``'s type and device, on memory that no other tensor uses any more.

    On the CPU, the storage of an earlier one is taken again once nothing refers to it (a parameter's ``grad`` that
    was set to None, say); CUDA's allocator does the same by itself.
    """
    if like.device.type != "cpu" or _uses is None:
        return like.new_empty(shape)
    with _lock:
        return _empty(_uses, shape, like)


def _empty(uses: Callable[[int], int], shape: tuple[int, ...], like: Tensor) -> Tensor:
    size = (shape, like.dtype)
    kept = _storages.setdefault(size, [])
    _asked[size] = now = max(_asked.values(), default=0) + 1
    for storage in kept:
        if uses(storage._cdata) == 1:
            return like.new_empty(0).set_(storage, 0, shape)  # type: ignore[call-overload]
    for old in [other for other, last in _asked.items() if now - last > STALE]:
        del _storages[old], _asked[old]
    fresh = like.new_empty(shape)
    if len(kept) < KEPT and fresh.nbytes >= 1 << 20:
        kept.append(fresh.untyped_storage())
    return fresh


def available(*tensors: Tensor) -> bool:
    """Whether the compiled kernels serve these tensors: float32 on the CPU, and a compiler was there."""
    return all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors) and load_native() is not None


def _argument(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, ctypes.c_double):
        return value
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_int(int(value)) if isinstance(value, bool) else ctypes.c_int64(value)


def _call(name: str, *arguments: Any) -> None:
    library = load_native()
    assert library is not None
    getattr(library, name)(*map(_argument, arguments))


def decode(latents: Tensor, values: Tensor, offsets: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """[N, d]: ``bias`` plus the sum of ``values[e] * W[latents[e]]`` over each row's entries."""
    out = empty((len(offsets) - 1, W.shape[1]), W)
    _call("decode_rows", latents, values, offsets, W, bias, out, W.shape[1], len(out), len(W))
    return out


def exact(latents: Tensor, offsets: Tensor, x: Tensor, W: Tensor, bias: Tensor) -> Tensor:
    """[nnz]: pre-activations ``x[row] · W[latent] + bias[latent]`` of the listed entries alone."""
    values = x.new_empty(len(latents))
    _call("exact_rows", latents, offsets, x, W, bias, values, x.shape[1], len(x))
    return values


def by_latent(latents: Tensor, offsets: Tensor, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """Entries sorted by latent: ``starts`` [d_sae + 1], ``order`` [nnz] (entry) and ``rows`` [nnz] of each place."""
    starts = torch.empty(d_sae + 1, dtype=torch.long)
    order, rows = torch.empty_like(latents), torch.empty_like(latents)
    _call("sort_by_latent", latents, offsets, len(offsets) - 1, d_sae, starts, order, rows)
    return starts, order, rows


def mono_rows(
    latents: Tensor, values: Tensor, offsets: Tensor, embeddings: Tensor, inverse: Tensor, d_sae: int, nothing: float,
    carried: tuple[Tensor, Tensor, Tensor] | None = None, decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Each latent's MonoScore on a batch [d_sae], which have one [d_sae] bool, and its derivative by each value [nnz].

    ``embeddings`` [N, d] float16 (where ``takes_half``) or float32, ``inverse`` [N] of their norms; a latent has none
    where (Σa)² - Σa² <= nothing · (Σa)². ``carried``: sums of a·h [d_sae, d], a and a² [d_sae] that count as well;
    this batch's are added to them, and they fade as if every activation were multiplied by ``decay``.
    """
    scores, valid = inverse.new_empty(d_sae), torch.empty(d_sae, dtype=torch.bool)
    grad = torch.empty_like(values)
    half = embeddings.dtype == torch.float16
    _call(
        "mono_rows", *by_latent(latents, offsets, d_sae), values, embeddings, half, inverse,
        *(carried or (None, None, None)), float(decay), float(nothing), scores, valid, grad, embeddings.shape[1], d_sae,
    )  # fmt: skip
    return scores, valid, grad


@cache
def takes_half() -> bool:
    """Whether ``mono_rows`` reads float16."""
    library = load_native()
    return library is not None and bool(library.takes_half())


def add_activations(
    latents: Tensor, values: Tensor, offsets: Tensor, x: Tensor, inverse: Tensor, states: Sequence[Tensor]
) -> None:
    """Add entries to each latent's count [d_sae] int64 and sums, in place.

    ``states``, float64 but the first: count, Σa, Σa², least, two largest [2, d_sae], and Σ a · inverse[row] · x[row]
    [d_sae, d]. ``x`` [N, d] float32, ``inverse`` [N] float64.
    """
    d_sae, d = states[-1].shape
    _call("add_activations", *by_latent(latents, offsets, d_sae), values, x, inverse, *states, d, d_sae)


def unit_rows(x: Tensor, total: Tensor) -> Tensor:
    """Norms [N] float64 of the rows of ``x`` [N, d] float32; ``total`` [d] float64 += the rows divided by them."""
    norms = torch.empty(len(x), dtype=torch.float64)
    _call("unit_rows", x, norms, total, x.shape[1], len(x))
    return norms


def reconstruction_sums(x: Tensor, y: Tensor, center: Tensor, sums: Sequence[Tensor]) -> Tensor:
    """Cosines [n] float64 of the rows of ``x`` and ``y`` [n, d] about ``center`` [d] float64.

    ``sums`` [d] float64 each, of (x - y)², x - center and (x - center)², are added to.
    """
    cosines = torch.empty(len(x), dtype=torch.float64)
    _call("reconstruction_sums", x, y, center, *sums, cosines, x.shape[1], len(x))
    return cosines


def moran(
    groups: Tensor, values: Tensor, offsets: Tensor, n_groups: int, weights: Any, min_active: int, min_variance: float
) -> Tensor:
    """Moran's I [n_groups] float64 of entries on rows of patches, grouped by ``groups`` [nnz]; see metrics/moran.py."""
    out = torch.empty(n_groups, dtype=torch.float64)
    _call(
        "moran", *by_latent(groups, offsets, n_groups), values, len(weights.reach), weights.start, weights.near,
        weights.weight, weights.reach, ctypes.c_double(weights.whole), min_active, ctypes.c_double(min_variance), out,
        n_groups,
    )  # fmt: skip
    return out


def rank_samples(
    latents: Tensor, values: Tensor, offsets: Tensor, first: int, strength: Tensor, sample: Tensor, fired: Tensor
) -> None:
    """Bring each latent's strongest samples ``strength`` and ``sample`` [d_sae, k] and count ``fired`` up to date."""
    _call("rank_samples", latents, values, offsets, first, strength.shape[1], strength, sample, fired, len(offsets) - 1)


def union(latents: Tensor, offsets: Tensor, each: int, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """As ``grouping.union``."""
    groups = (len(offsets) - 1) // each
    counts = torch.empty(groups, dtype=torch.long)
    _call("count_union", latents, offsets, each, d_sae, counts, groups)
    starts = offsets_of(counts)
    pooled, place = torch.empty(int(starts[-1]), dtype=torch.long), torch.empty_like(latents)
    _call("fill_union", latents, offsets, each, d_sae, starts, pooled, place, groups)
    return pooled, starts, place


OFTEN = 12  # entries of a latent that are worth writing its row's gradient once more

NEAR = 1 << 20  # bytes of gradients up to which they stay near the processor


def decode_backward(
    latents: Tensor, values: Tensor, offsets: Tensor, W: Tensor, grad: Tensor,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of ``decode``: of W [d_sae, d] and of values [nnz], reading each row of ``grad`` once an entry.

    ``into``: those of W and of a matrix of codes [N, d_sae], whose N · h groups the rows are, to be added to.
    """
    grad_W, grad_values = into or (empty(tuple(W.shape), W).zero_(), torch.empty_like(values))
    n, (d_sae, d) = len(grad), W.shape
    block = OFTEN * n * d_sae // max(1, len(values)) + 1
    block = block if 4 * d * block <= NEAR else max(1, n)
    h = n // len(grad_values) if into and n else 0
    _call("decode_backward", latents, values, offsets, W, grad, grad_W, grad_values, h, block, d, d_sae, n)
    return grad_W, grad_values


def scatter(latents: Tensor, values: Tensor, offsets: Tensor, x: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """[d_sae, d] sums of ``values[e] * x[row]`` over each latent's entries, and [d_sae] sums of values."""
    out, total = empty((d_sae, x.shape[1]), x), x.new_empty(d_sae)
    _call("scatter_rows", *by_latent(latents, offsets, d_sae), values, x, out, total, x.shape[1], d_sae)
    return out, total


def to_bf16(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A bfloat16 copy of ``W`` [n, d], its rows' norms [n] and the norms [n] of what rounding took from them."""
    out = empty(tuple(W.shape), W.new_empty(0, dtype=torch.bfloat16))
    norms, errors = W.new_empty(len(W)), W.new_empty(len(W))
    _call("to_bf16", W, out, norms, errors, W.shape[1], len(W))
    return out, norms, errors


def above(
    pre: Tensor, bias: Tensor, cuts: Tensor, slack: Tensor | None, norms: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, values and offsets of the entries of ``pre + bias`` at or above their latent's cut.

    ``pre`` [n, d_sae] float32 or bfloat16; ``cuts`` [d_sae], lowered by ``slack[row] * norms[latent]`` where given.
    """
    n, d_sae = pre.shape
    half = pre.dtype == torch.bfloat16
    counts, marks = torch.empty(n, dtype=torch.long), torch.empty(n, -(-d_sae // 64), dtype=torch.long)
    _call("mark_above", pre, half, bias, d_sae, cuts, slack, norms, marks, counts, n)
    offsets = offsets_of(counts)
    latents = torch.empty(int(offsets[-1]), dtype=torch.long)
    values = bias.new_empty(len(latents))
    _call("fill_above", pre, half, bias, d_sae, marks, offsets, latents, values, n)
    return latents, values, offsets


def topk(
    pre: Tensor, bias: Tensor, k: int, slack: Tensor | None, relative: float, norms: Tensor | None, x: Tensor, W: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest positive entries of each row: latents and values [n, k] (filled from the left), counts [n]."""
    n, d_sae = pre.shape
    latents, counts = torch.empty(n, k, dtype=torch.long), torch.empty(n, dtype=torch.long)
    values = bias.new_empty(n, k)
    widest = float(norms.max()) if norms is not None else 0.0
    _call(
        "topk_rows", pre, pre.dtype == torch.bfloat16, bias, d_sae, k, slack, float(relative), norms, widest,
        x, W, W.shape[1], latents, values, counts, n,
    )  # fmt: skip
    return latents, values, counts


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of ``values`` [n], a scalar tensor."""
    out = values.new_empty(())
    _call("select_kth", values.clone(), len(values), k, out)
    return out


def squared_norm(grad: Tensor, rows: Tensor | None) -> float:
    """|grad|² in float64; without each row's part along ``rows`` (of unit norm) where given. ``grad`` [n, d] or [n]."""
    n, d = (len(grad), grad.shape[1]) if grad.ndim == 2 else (1, grad.numel())
    out = torch.zeros((), dtype=torch.float64)
    _call("squared_norm", grad, rows, d, out, n)
    return float(out)


def adam(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, *, scale: float, lr: float, step: int, betas: tuple[float, float],
    eps: float, weight_decay: float, decoupled: bool, unit: bool,
) -> None:  # fmt: skip
    """One Adam (AdamW where ``decoupled``) step of ``p`` in place; ``unit`` keeps its rows at unit norm."""
    n, d = (len(p), p.shape[1]) if p.ndim == 2 else (1, p.numel())
    step_size, root = lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5
    shrink, decay = (1 - lr * weight_decay, 0.0) if decoupled else (1.0, weight_decay)
    _call(
        "adam_rows", p, grad, m, v, d, float(scale), float(step_size), float(root), float(betas[0]), float(betas[1]),
        float(eps), float(shrink), float(decay), unit, n,
    )  # fmt: skip


def normalize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std in float32; ``x`` [..., d] contiguous, of float16, bfloat16 or float32."""
    out = mean.new_empty(x.shape)
    kind = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}[x.dtype]
    _call("normalize_rows", x, kind, mean, float(std), out, x.shape[-1], x.numel() // max(1, x.shape[-1]))
    return out


def rank_groups(values: Tensor, offsets: Tensor, ks: Tensor) -> Tensor:
    """As ``products.rank_groups``."""
    group = torch.empty(len(values), dtype=torch.long)
    _call("rank_groups", values, offsets, 0, ks, len(ks), -1, None, group, None, None, len(offsets) - 1)
    return group


def ranked(dense: Tensor, ks: Tensor, left_out: int, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and values of the positive entries of ``dense`` [N, d_sae] by (row, group of rank); see ``products``.

    ``starts`` [N · h + 1] are the groups' offsets, where that of group ``left_out`` is empty.
    """
    n, d_sae = dense.shape
    latents = torch.empty(int(starts[-1]), dtype=torch.long)
    kept = dense.new_empty(len(latents))
    _call("rank_groups", dense, None, d_sae, ks, len(ks), left_out, starts, None, latents, kept, n)
    return latents, kept
