"""Features of other programs become stores that hold the same rows."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

from sae_lightning.commands.main import main
from sae_lightning.features import importing
from sae_lightning.features.importing import import_features, spooled
from sae_lightning.features.manifest import StoreError
from sae_lightning.features.store import FeatureStore

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(60, 8)).astype(np.float32)
LABELS = [f"c{i % 3}" for i in range(60)]


def npy(folder: Path) -> Path:
    np.save(folder / "x.npy", ROWS)
    return folder / "x.npy"


def fortran(folder: Path) -> Path:
    np.save(folder / "x.npy", np.asfortranarray(ROWS))
    return folder / "x.npy"


def several(folder: Path) -> Path:
    for i in range(12):  # x10 comes after x9
        np.save(folder / f"x{i}.npy", ROWS[5 * i : 5 * i + 5].astype(">f8"))
    return folder


def tensor(folder: Path) -> Path:
    torch.save(torch.from_numpy(ROWS), folder / "x.pt")
    return folder / "x.pt"


def dictionary(folder: Path) -> Path:
    torch.save({"features": torch.from_numpy(ROWS), "labels": LABELS, "other": torch.ones(3)}, folder / "x.pth")
    return folder / "x.pth"


def safetensors(folder: Path) -> Path:
    save_file({"activations": torch.from_numpy(ROWS), "mask": torch.ones(60)}, folder / "x.safetensors")
    return folder / "x.safetensors"


def parquet(folder: Path) -> Path:
    table = pa.table({"id": [f"n{i}" for i in range(60)], "embedding": ROWS.tolist(), "label": LABELS})
    pq.write_table(table, folder / "x.parquet", row_group_size=17)
    return folder / "x.parquet"


def webdataset(folder: Path) -> Path:
    with tarfile.open(folder / "x.tar", "w") as tar:
        for i, (row, label) in enumerate(zip(ROWS, LABELS, strict=True)):
            held = io.BytesIO()
            np.save(held, row)
            for name, data in ((f"{i:03d}.npy", held.getvalue()), (f"{i:03d}.cls", label.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder / "x.tar"


def lmdb(folder: Path) -> Path:
    env = pytest.importorskip("lmdb").open(str(folder / "x.lmdb"), map_size=1 << 24)
    with env.begin(write=True) as txn:
        for i, row in enumerate(ROWS):
            txn.put(str(i).encode(), row.tobytes())
        txn.put(b"__len__", b"60")
        txn.put(b"__shape__", b"(8,)")
    env.close()
    return folder / "x.lmdb"


LABELLED = {dictionary, parquet, webdataset}


@pytest.mark.parametrize(
    "make",
    [npy, fortran, several, tensor, dictionary, safetensors, parquet, webdataset, lmdb],
    ids=lambda f: f.__name__,
)
def test_a_store_holds_the_rows_of_every_format(make, tmp_path):
    (tmp_path / "in").mkdir()
    store = import_features(make(tmp_path / "in"), tmp_path / "store", "some-encoder")
    assert torch.equal(store.features(slice(None)).float(), torch.from_numpy(ROWS).half().float()[:, None])
    assert (store.kind, store.backbone, store.manifest.grid) == ("pooled", "some-encoder", (1, 1))
    names = [store.class_names[i] for i in store.labels.tolist()]
    assert names == (LABELS if make in LABELLED else ["unlabelled"] * 60)
    assert len(set(store.image_ids)) == 60
    if make is parquet:
        assert store.image_ids[:2] == ["n0", "n1"]


def test_rows_of_arrays_are_rounded_once_and_described(tmp_path):
    x = RNG.normal(3, 2, size=(500, 16))
    store = import_features(x, tmp_path / "s")
    kept = torch.from_numpy(x).half().double()
    assert torch.allclose(store.mean.double(), kept.mean(0), rtol=1e-6)
    assert torch.allclose(store.deviation.double(), kept.std(0, unbiased=False), rtol=1e-6)
    lost = (torch.from_numpy(x).float().double() - kept).square().sum() / (kept - kept.mean(0)).square().sum()
    assert store.manifest.rounding == pytest.approx(float(lost), rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_other_types_of_store(dtype, tmp_path):
    store = import_features(ROWS, tmp_path / "s", dtype=dtype)
    assert torch.allclose(store.features(slice(None)).float()[:, 0], torch.from_numpy(ROWS), atol=0.05)


TOKENS = RNG.normal(size=(5, 12, 8)).astype(np.float32)


@pytest.mark.parametrize(
    ("x", "options", "kind", "grid"),
    [
        (TOKENS, {}, "patch", (1, 12)),
        (TOKENS, {"grid": (3, 4)}, "patch", (3, 4)),
        (TOKENS.reshape(60, 8), {"grid": (3, 4)}, "patch", (3, 4)),
        (TOKENS.reshape(5, 3, 4, 8), {"grid": (3, 4)}, "patch", (3, 4)),
        (TOKENS.reshape(5, 3, 4, 8).transpose(0, 3, 1, 2), {"grid": (3, 4)}, "patch", (3, 4)),
        (TOKENS, {"grid": (1, 11), "prefix": 1}, "tokens", (1, 11)),
        (TOKENS[:, :9], {}, "patch", (3, 3)),
    ],
)
def test_tokens_and_maps_become_images(x, options, kind, grid, tmp_path):
    store = import_features(x, tmp_path / "s", **options)
    p = 9 if x.shape[1] == 9 else 12
    assert torch.equal(store.features(slice(None)).float(), torch.from_numpy(TOKENS[:, :p]).half().float())
    assert (store.kind, store.manifest.grid, store.manifest.prefix) == (kind, grid, options.get("prefix", 0))


def test_shards_of_saev(tmp_path):
    acts = RNG.normal(size=(7, 2, 5, 8)).astype(np.float32)  # images, layers, class token and patches
    for i, some in enumerate((acts[:4], acts[4:])):
        some.tofile(tmp_path / f"acts{i:06d}.bin")
    about = {"vit_family": "dinov2", "vit_ckpt": "dinov2_vitb14", "layers": [4, 10], "n_patches_per_img": 4,
             "cls_token": True, "d_vit": 8, "n_imgs": 7, "dtype": "float32", "protocol": "1.0.0"}  # fmt: skip
    (tmp_path / "metadata.json").write_text(json.dumps(about))
    shards = [{"name": "acts000000.bin", "n_imgs": 4}, {"name": "acts000001.bin", "n_imgs": 3}]
    (tmp_path / "shards.json").write_text(json.dumps(shards))
    with pytest.raises(StoreError, match=r"layers \[4, 10\]; choose one"):
        import_features(tmp_path, tmp_path / "s")
    store = import_features(tmp_path, tmp_path / "s", layer=10)
    assert torch.equal(store.features(slice(None)).float(), torch.from_numpy(acts[:, 1]).half().float())
    assert (store.backbone, store.layer, store.kind) == ("dinov2 dinov2_vitb14", 10, "tokens")
    assert (store.manifest.grid, store.manifest.prefix) == ((2, 2), 1)
    (tmp_path / "acts000001.bin").write_bytes(b"cut")
    with pytest.raises(StoreError, match=r"acts000001\.bin is missing or shorter"):
        import_features(tmp_path, tmp_path / "t", layer=10)


BAD = RNG.normal(size=(60, 8)).astype(np.float32)
BAD[41, 3] = np.nan
LARGE = RNG.normal(size=(60, 8)).astype(np.float32)
LARGE[2, 7] = 70000


@pytest.mark.parametrize(
    ("x", "options", "said"),
    [
        (BAD, {}, "array: row 41 holds nan in dimension 3; features must be finite"),
        (LARGE, {}, "array: row 2 holds 70,000 in dimension 7, too large for float16; give --dtype=bfloat16"),
        (ROWS[:0], {}, "it is empty"),
        ([], {}, "the list of sources is empty"),
        ([ROWS, ROWS[:, :4]], {}, r"array has rows of shape \[1, 4\], array of \[1, 8\]; import them apart"),
        (np.array([["a", "b"]]), {}, "which is no real number"),
        (ROWS.astype(np.complex64), {}, "which is no real number"),
        (ROWS, {"labels": LABELS[:59]}, "59 labels for 60 images"),
        (ROWS, {"ids": ["a"] * 61}, "61 ids for 60 images"),
        (ROWS, {"ids": ["a"] * 60}, "60 ids name 1 images"),
        (ROWS, {"grid": (7, 7)}, "60 tokens, which are no whole images of 7 x 7"),
        (TOKENS, {"grid": (3, 3)}, "12 tokens an image, and --grid=3x3 has 9"),
        (TOKENS.reshape(5, 3, 4, 8), {}, r"rows of shape \[3, 4, 8\]"),
        (Path("nowhere"), {}, "no file or folder nowhere"),
    ],
)
def test_what_cannot_be_imported_is_said_and_leaves_nothing(x, options, said, tmp_path):
    with pytest.raises(StoreError, match=said):
        import_features(x, tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.npy", b"no array", "cannot be read as .npy"),
        ("x.pt", b"no archive", "cannot be read as .pt"),
        ("x.safetensors", b"nothing", "cannot be read as .safetensors"),
        ("x.csv", b"1,2", "is none of .npy"),
    ],
)
def test_broken_files_are_named(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StoreError, match=rf"{name} .*{said}" if "none" not in said else said):
        import_features(tmp_path / name, tmp_path / "s")


def test_nothing_pickled_is_loaded(tmp_path):
    torch.save({"features": Path("anything")}, tmp_path / "x.pt")
    with pytest.raises(StoreError, match="cannot be read"):
        import_features(tmp_path / "x.pt", tmp_path / "s")


def test_a_killed_import_goes_on_from_its_last_shard(tmp_path, monkeypatch):
    path, read = npy(tmp_path), []

    class Killed(BaseException):
        pass

    def stop(done: int, all_: int) -> None:
        if done > 30:
            raise Killed

    with pytest.raises(Killed):
        import_features(path, tmp_path / "s", progress=stop)
    import_features(path, tmp_path / "s", progress=lambda done, all_: read.append(done))
    assert 0 < read[0] <= 30
    assert torch.equal(
        FeatureStore.open(tmp_path / "s").features(slice(None)).float()[:, 0], torch.from_numpy(ROWS).half().float()
    )
    with pytest.raises(StoreError, match="exists; name another folder"):
        import_features(path, tmp_path / "s")


def test_the_fingerprint_is_that_of_the_rows(tmp_path):
    of_array = import_features(ROWS, tmp_path / "a")
    again = import_features(ROWS.copy(), tmp_path / "b")
    other = import_features(ROWS + 1e-2, tmp_path / "c")
    assert of_array.fingerprint == again.fingerprint != other.fingerprint


def test_memory_bounds_what_is_read_at_once(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(importing, "COPIES", 1)
    pieces = importing.blocks

    def watched(*arguments):
        for piece, first, x in pieces(*arguments):
            seen.append(x.numel() * 4)
            yield piece, first, x

    monkeypatch.setattr(importing, "blocks", watched)
    import_features(ROWS, tmp_path / "s", memory_gb=100 / 2**30)
    assert max(seen) <= 100
    assert sum(seen) == ROWS.nbytes


def test_loaders_of_features_and_labels(tmp_path):
    data = TensorDataset(torch.from_numpy(ROWS), torch.arange(60) % 3)
    with spooled(DataLoader(data, batch_size=7), tmp_path) as (x, labels):
        assert np.array_equal(x, ROWS)
        assert labels == [i % 3 for i in range(60)]
    with pytest.raises(StoreError, match="Batch 1 is of shape"), spooled(iter([ROWS, ROWS[:, :2]]), tmp_path):
        pass
    with pytest.raises(StoreError, match="Batch 0 is of str"), spooled(iter(["a"]), tmp_path):
        pass


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    npy(tmp_path)
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    command = ["store", "import", "x.npy", "--into", "stores/mine", "--grid", "2x3", "--labels", "labels.txt"]
    assert main(command) == 1
    assert "60 labels for 10 images" in capsys.readouterr().err
    assert main([*command[:-2], "--backbone", "mine"]) == 0
    assert "python train.py data=features data.train=stores/mine" in capsys.readouterr().out
    store = FeatureStore.open(tmp_path / "stores" / "mine")
    assert (len(store), store.n_patches, store.manifest.grid) == (10, 6, (2, 3))
    assert main(command) == 1
    shutil.rmtree("stores")
    with pytest.raises(SystemExit):
        main([*command[:-4], "--grid", "6"])
    assert "no grid such as 16x16" in capsys.readouterr().err
