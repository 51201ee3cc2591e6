"""The Triton kernels: their arithmetic by Triton's interpreter, their compilation for GPUs, and both on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sae_lightning.kernels import portable, products
from sae_lightning.kernels import triton as on_triton
from tests.kernels import triton_cases

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
on_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")


def wrong(differences: dict[str, float]) -> dict[str, float]:
    return {name: worst for name, worst in differences.items() if not worst < 1e-5}


@pytest.mark.slow
def test_interpreted_kernels_equal_the_reference():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.kernels.triton_cases", "cpu"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert wrong(json.loads(done.stdout)) == {}


KINDS = {
    "d": "i32", "nnz": "i32", "n_parts": "i32", "d_sae": "i32", "chunk": "i32", "latents": "*i64", "offsets": "*i64",
    "starts": "*i64", "order": "*i64", "rows": "*i64", "part_latents": "*i64", "part_ends": "*i64",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("number", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("decode_rows", {"BIAS": True}), ("decode_rows", {"BIAS": False}), ("exact_rows", {}),
        ("normalize_rows", {}), ("sum_latents", {"DOTS": True}), ("sum_latents", {"DOTS": False}),
        ("add_parts", {"DOTS": True}), ("add_parts", {"DOTS": False}),
    ],
)  # fmt: skip
def test_kernels_compile_without_a_gpu(name, constants, number, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    backends = pytest.importorskip("triton.backends.compiler")
    from sae_lightning.kernels import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(triton_kernels, name)
    constants = constants | {"ENTRIES": 4, "BLOCK": 1024}
    signature = {a: "constexpr" if a in constants else KINDS.get(a, f"*{number}") for a in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    for arch in (80, 90):
        built = triton.compile(source, backends.GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": True})
        assert built.asm["cubin"]


def test_tensors_on_the_cpu_are_left_to_other_kernels():
    assert not on_triton.available(torch.ones(2, 2))
    assert products.choose(torch.ones(2, 2)) is not on_triton


def test_where_triton_does_not_work_portable_serves_the_gpu(monkeypatch):
    def fail(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(on_triton, "decode_backward", fail)
    monkeypatch.setattr(on_triton, "find_spec", lambda name: name)
    usable = on_triton._usable.__wrapped__
    with pytest.warns(UserWarning, match="Failed to find C compiler"):
        assert not usable(torch.device("cpu"))
    monkeypatch.setattr(on_triton, "find_spec", lambda name: None)
    assert not usable(torch.device("cpu"))


@on_gpu
def test_kernels_equal_the_reference_on_a_gpu():
    assert on_triton.available(torch.ones(2, 2, device="cuda"))
    assert products.choose(torch.ones(2, 2, device="cuda")) is on_triton
    assert products.choose(torch.ones(2, 2, device="cuda", dtype=torch.float64)) is portable
    assert wrong(triton_cases.differences("cuda")) == {}


@on_gpu
def test_a_latent_active_on_every_sample_on_a_gpu():
    torch.manual_seed(0)
    n, d, d_sae = 8192, 768, 1000
    latents = torch.randint(1, d_sae, (n, 4)).sort(1).values
    latents[:, 0] = 0
    given = latents.flatten().cuda(), torch.randn(4 * n).cuda() / n**0.5, torch.arange(0, 4 * n + 1, 4).cuda()
    x, W = torch.randn(n, d).cuda(), torch.randn(d_sae, d).cuda() / d**0.5
    got, expected = (m.decode_backward(*given, W, x) for m in (on_triton, portable))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    got, expected = (m.scatter(*given, x, d_sae) for m in (on_triton, portable))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
