"""Parquet shards of a local data set that are empty are passed over; what is wrong with another is told by its name."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_lightning.data import DataError, load_images
from sae_lightning.data.errors import DataWarning
from tests.data.making import hf_cfg, png

WHOLE = {"train": "train", "val": "train", "test": "train"}


def rows(start, n=6, **other):
    pictures = [{"bytes": png(i), "path": None} for i in range(start, start + n)]
    return pa.table({"image": pictures, "label": ["a", "b"] * (n // 2)} | other)


def write(root, *tables):
    for i, table in enumerate(tables):
        pq.write_table(table, root / f"train-{i:05d}-of-{len(tables):05d}.parquet", row_group_size=3)
    return hf_cfg(root, held_out=0.0, splits=WHOLE)


def seeds(cfg):
    """Whose pictures the split holds, in order."""
    of = {png(i): i for i in range(20)}
    images = load_images(cfg, "train")
    items = images.items() if cfg["streaming"] else map(images.item, range(len(images)))
    return [of[item.image] for item in items]


EMPTY = {
    "no rows": rows(0).slice(0, 0),
    "no columns": pa.table({}),
    "no types": pa.table({"image": [], "label": []}),
    "other columns": pa.table({"picture": pa.array([], pa.binary())}),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", EMPTY)
@pytest.mark.parametrize("place", [0, 1])
def test_a_shard_without_rows_is_passed_over(kind, place, streaming, tmp_path):
    tables = [rows(0), rows(6)]
    tables.insert(place, EMPTY[kind])
    cfg = write(tmp_path, *tables) | {"streaming": streaming}
    with pytest.warns(DataWarning, match=rf"1 without rows are passed over \(first: .*train-0000{place}-of-00003"):
        assert seeds(cfg) == list(range(12))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_group_without_rows_is_passed_over(streaming, tmp_path):
    cfg = write(tmp_path, rows(0)) | {"streaming": streaming}
    with pq.ParquetWriter(tmp_path / "train-00000-of-00001.parquet", rows(0).schema) as writer:
        for table in (rows(0).slice(0, 0), rows(0), rows(0).slice(0, 0), rows(6)):
            writer.write_table(table)
    assert seeds(cfg) == list(range(12))


def cut(data: bytes) -> bytes:
    return data[:-100]


def nothing(data: bytes) -> bytes:
    return b""


def torn(data: bytes) -> bytes:
    """Pages of zeros where rows were; the end, which is read first, is whole."""
    return data[:200] + bytes(600) + data[800:]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [(cut, "no whole parquet file .*footer"), (nothing, "no whole parquet .*0 bytes"), (torn, "damaged|broke in")],
)  # fmt: skip
def test_a_damaged_shard_is_named_with_its_fault(damage, sentence, streaming, tmp_path):
    cfg = write(tmp_path, rows(0), rows(6), rows(12)) | {"streaming": streaming}
    file = tmp_path / "train-00001-of-00003.parquet"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=sentence) as told:
        seeds(cfg)
    assert file.name in str(told.value)
    assert "connection" not in str(told.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_of_other_shapes_are_named(streaming, tmp_path):
    cfg = write(tmp_path, rows(0), rows(6).rename_columns(["image", "species"])) | {"streaming": streaming}
    with pytest.raises(
        DataError, match=r"00001-of-00002\.parquet has the columns \['image', 'species'\], but .*00000-of"
    ):
        seeds(cfg)
    write(tmp_path, rows(0), rows(6).set_column(1, "label", pa.array([b"\xff"] * 6)))
    with pytest.raises(
        DataError, match=r"Column 'label' of .*00001-of-00002\.parquet holds binary|broke in shard 1 .*00001-of"
    ):
        seeds(cfg)
    write(tmp_path, rows(0, 0), rows(0, 0))
    with pytest.raises(DataError, match=r"None of the 2 parquet files of .* holds a row"):
        seeds(cfg)
