"""The C file is compiled once, and nothing depends on it."""

import pytest

from tests import processes

PROGRAM = """
import torch
from sae_lightning.kernels import native
from sae_lightning.saes import TopK
sae = TopK(16, 64, k=4, seed=0)
x = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
run = sae.forward_pass(x)
(run.reconstruction - x).square().mean().backward()
print(native.available(x), f"{float(sae.W_enc.grad.norm()):.5f}")
"""


def run(tmp_path, **environment):
    done = processes.run("-c", PROGRAM, cwd=tmp_path, SAE_LIGHTNING_CACHE=str(tmp_path / "cache"), **environment)
    return done.stdout.split(), done.stderr


@pytest.mark.slow
def test_training_without_a_compiler_gives_the_same_gradients_and_says_why_it_is_slow(tmp_path):
    with_it, _ = run(tmp_path)
    libraries = list((tmp_path / "cache").glob("native-*.so"))
    if with_it[0] == "False":
        pytest.skip("there is no C compiler here")
    assert len(libraries) == 1
    compiled = libraries[0].stat().st_mtime_ns
    without, said = run(tmp_path, CC="/bin/false")
    assert without == ["False", with_it[1]]
    assert "Install a C compiler" in said
    off, said = run(tmp_path, SAE_LIGHTNING_NATIVE="0")
    assert off == ["False", with_it[1]]
    assert "compiler" not in said
    assert run(tmp_path)[0] == with_it
    assert libraries[0].stat().st_mtime_ns == compiled  # not built again
