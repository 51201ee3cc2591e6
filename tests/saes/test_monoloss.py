"""MonoLoss and its gradient equal the paper's definition in dense autograd, whatever the kernels, ranks and corners."""

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sae_lightning.kernels import native, products
from sae_lightning.saes.codes import DenseCodes, SparseCodes
from sae_lightning.saes.monoloss import Memory, dense_mono_loss, mono_loss


def reference(activations: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """§3.3 written down: min–max scaled activations, all pairs, the mean over units with a denominator."""
    h = embeddings / embeddings.norm(dim=1, keepdim=True)
    low, high = activations.amin(0), activations.amax(0)
    scaled = (activations - low) / torch.where(high > low, high - low, 1)
    pairs = torch.ones(len(h), len(h)).triu(1).bool()
    weight = (scaled[:, None] * scaled[None])[pairs]  # [pairs, M]
    above, below = (weight * (h @ h.T)[pairs][:, None]).sum(0), weight.sum(0)
    active = below > 1e-6 * scaled.sum(0).square()
    if not bool(active.any()):
        return torch.ones(())
    return 1 - (above[active] / below[active]).mean()


def activations(n: int = 24, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[n, 9]: dense, sparse, always active (one of them constant), never, once, and twice active latents."""
    g = torch.Generator().manual_seed(seed)
    a = torch.relu(torch.randn(n, 9, generator=g, dtype=torch.float64) - 0.8)
    a[:, 1] = torch.rand(n, generator=g, dtype=torch.float64) + 0.2
    a[:, 2] = 0.5
    a[:, 3:6] = 0
    a[4, 4], a[[3, 9], 5] = 1.5, torch.tensor([0.4, 2.0], dtype=torch.float64)
    return a.to(dtype)


def similar(n: int = 24, d: int = 5, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (torch.randn(n, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.2).to(dtype)


def value_and_gradient(loss_of, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a = a.clone().requires_grad_()
    loss = loss_of(a)
    (grad,) = torch.autograd.grad(3 * loss, a, allow_unused=True)
    return loss.detach(), torch.zeros_like(a) if grad is None else grad


def sparse_loss(h: torch.Tensor, memory: Memory | None = None):
    return lambda a: mono_loss(SparseCodes.select(a, a.detach() > 0), h, memory)


@pytest.mark.parametrize("form", ["sparse", "dense codes", "matrix"])
def test_equals_the_definition(form):
    a, h = activations(), similar()
    ours = {
        "sparse": sparse_loss(h), "dense codes": lambda x: mono_loss(DenseCodes(x), h),
        "matrix": lambda x: dense_mono_loss(x, h),
    }[form]  # fmt: skip
    (loss, grad), (expected, slope) = value_and_gradient(ours, a), value_and_gradient(lambda x: reference(x, h), a)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    slope = slope * (a > 0) if form == "sparse" else slope  # lists give no gradient to silent latents; nor does ReLU
    torch.testing.assert_close(grad, slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernels", ["native", "portable", "reference"])
@pytest.mark.parametrize("d", [5, 64, 83])
def test_every_kernel_and_type_of_features(kernels, dtype, d, monkeypatch):
    a, h = activations(60, dtype=torch.float32), similar(60, d, dtype)
    expected, slope = value_and_gradient(lambda x: reference(x, h.double()), a.double())
    if kernels == "native":
        loss, grad = value_and_gradient(sparse_loss(h), a)
    else:
        monkeypatch.setattr(native, "available", lambda *_: False)
        with products.forced(kernels):
            loss, grad = value_and_gradient(sparse_loss(h), a)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, (slope * (a > 0)).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_many_entries_on_many_threads():
    a = torch.relu(torch.randn(700, 300, generator=torch.Generator().manual_seed(0)) - 1)
    h = similar(700, 96, torch.float32)
    (loss, grad), (expected, slope) = (value_and_gradient(f, a) for f in (sparse_loss(h), lambda x: reference(x, h)))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, slope * (a > 0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["nothing active", "one image each", "constant"])
def test_one_where_no_latent_has_a_score(kind):
    a = {"nothing active": torch.zeros(6, 4), "one image each": torch.eye(6)[:, :4], "constant": torch.ones(6, 4)}[kind]
    for loss_of in (sparse_loss(similar(6)), lambda x: dense_mono_loss(x, similar(6))):
        loss, grad = value_and_gradient(loss_of, a.double())
        assert float(loss) == 1
        assert not bool(grad.any())


def test_an_image_without_direction_is_left_out():
    a, h = activations(), similar()
    h[7] = 0
    silent = a.clone()
    silent[7] = torch.where(a[7] > 0, a.amin(0), a[7])
    expected = reference(silent, similar())
    assert float(mono_loss(SparseCodes.select(a, a > 0), h)) == pytest.approx(float(expected))
    assert float(dense_mono_loss(a, h)) == pytest.approx(float(expected))


def test_a_rescaled_latent_has_the_same_score_and_a_step_down_the_gradient_raises_it():
    a, h = activations(), similar()
    scaled = a * torch.tensor([3.0, 0.1, 1, 1, 1, 7, 100, 0.5, 2])
    assert float(mono_loss(SparseCodes.select(scaled, scaled > 0), h)) == pytest.approx(float(sparse_loss(h)(a)))
    loss, grad = value_and_gradient(sparse_loss(h), a)
    assert float(sparse_loss(h)((a - 0.01 * grad).clamp_min(0))) < float(loss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["products", "kernel"])
def test_memory_is_the_score_of_all_batches_with_faded_activations(dtype):
    """Only the newest batch has a gradient; a latent that it does not activate has no part in the mean."""
    a, h = activations(60, dtype=dtype)[:, [0, 3, 5, 6, 7, 8]], similar(60, dtype=dtype)
    a[40:, 3] = 0  # active before, silent in the last batch
    memory = Memory.empty(0.8, 6, 5, a)
    batches = [slice(0, 25), slice(25, 40), slice(40, 60)]
    for age, rows in enumerate(batches):
        loss, grad = value_and_gradient(sparse_loss(h[rows], memory), a[rows])
        past = [0.8 ** (age - i) * a[earlier] for i, earlier in enumerate(batches[:age])]
        here = (a[rows] > 0).any(0)

        def whole(x, past=past, rows=rows, here=here):
            return reference(torch.cat([*past, x])[:, here], h[: rows.stop])

        expected, slope = value_and_gradient(whole, a[rows])
        exact = dtype == torch.float64
        torch.testing.assert_close(loss, expected, rtol=1e-12 if exact else 1e-5, atol=1e-14 if exact else 1e-6)
        torch.testing.assert_close(grad, slope * (a[rows] > 0), rtol=1e-9 if exact else 1e-3, atol=1e-6)


def test_gradient_through_the_embeddings_on_request():
    a, h = activations(), similar().requires_grad_()
    expected = torch.autograd.grad(reference(a, h), h)[0]
    torch.testing.assert_close(torch.autograd.grad(dense_mono_loss(a, h, True), h)[0], expected, rtol=1e-9, atol=1e-12)
    assert not dense_mono_loss(a, h).requires_grad


# --- ranks --------------------------------------------------------------------------------------------------------
def losses(rows: slice, a: torch.Tensor, h: torch.Tensor) -> dict[str, torch.Tensor]:
    part, like = a[rows], h[rows]
    out: dict[str, torch.Tensor] = {}
    out["sparse"], out["sparse grad"] = value_and_gradient(sparse_loss(like), part)
    out["dense"], out["dense grad"] = value_and_gradient(lambda x: dense_mono_loss(x, like), part)
    memory = Memory.empty(0.9, a.shape[1], h.shape[1], a)
    for _ in range(2):
        out["memory"], out["memory grad"] = value_and_gradient(sparse_loss(like, memory), part)
    mixed = (lambda x: mono_loss(DenseCodes(x), like)) if rows.start == 0 else sparse_loss(like)
    out["mixed"], slope = value_and_gradient(mixed, part)
    return out | {"mixed grad": slope * (part > 0)}


def rank_main(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    rows = slice(0, 9) if rank == 0 else slice(9, None)
    torch.save(losses(rows, activations(), similar()), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path):
    """Each rank has the loss of the global batch, and the mean of their gradients is its gradient."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(rank_main, args=(port, str(tmp_path)), nprocs=2, start_method="fork")
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, expected in losses(slice(0, None), activations(), similar()).items():
        if name.endswith("grad"):
            torch.testing.assert_close(torch.cat([f[name] for f in found]) / 2, expected, rtol=1e-9, atol=1e-12)
        else:
            for each in found:
                torch.testing.assert_close(each[name], expected, rtol=1e-12, atol=0)
