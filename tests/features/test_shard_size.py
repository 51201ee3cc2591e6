"""How an extraction is cut: by its data, its processes and a minute of work; what a killed one leaves; its progress."""

from __future__ import annotations

import pytest

import sae_lightning.features.extraction as extraction
from sae_lightning.backbones.registry import load_backbone
from sae_lightning.features.extraction import images_a_shard, seconds_an_image
from sae_lightning.features.source import Source, writer
from tests.backbones.models import backbone
from tests.features import jobs
from tests.features.jobs import extract_pixels, litter

VIT_B, TINY = 196 * 768 * 2, 64 * 128 * 2  # bytes of an image
SLOW, FAST = 1.1, 0.001  # seconds of an image


@pytest.mark.parametrize(
    ("n_images", "image_bytes", "seconds", "processes", "expected"),
    [
        (2000, VIT_B, SLOW, 1, 54),  # a minute
        (2000, VIT_B, FAST, 1, 256),
        (2000, VIT_B, FAST, 3, 256),
        (200, TINY, FAST, 3, 67),  # each has one
        (6000, TINY, FAST, 1, 768),
        (6000, TINY, FAST, 6, 256),
        (1_281_167, VIT_B, FAST, 1, 768),  # 256 MB
        (1_281_167, 1024, FAST, 8, 4096),
        (None, VIT_B, FAST, 1, 768),
        (None, VIT_B, SLOW, 1, 54),
        (3, VIT_B, 100, 1, 1),
        (10, TINY, FAST, 64, 1),
    ],
)
def test_shards_follow_the_data_the_processes_and_a_minute(n_images, image_bytes, seconds, processes, expected):
    assert images_a_shard(n_images, image_bytes, seconds, processes, 256) == expected


def test_a_small_data_set_is_shared_by_all_processes(tmp_path):
    pictures = jobs.make_pictures(tmp_path / "p", 10)
    tiny = load_backbone(backbone("mae"))
    assert seconds_an_image(tiny, "cuda") == pytest.approx(seconds_an_image(tiny, "cpu") / 100)
    for i, (override, expected) in enumerate(
        {"extract.devices=3": 4, "extract.part=1/5": 2, "data.seed=1": 10}.items()
    ):
        overrides = ["extract.images_per_shard=null", "extract.batch_size=256", override]
        cfg = jobs.picture_config(pictures, tmp_path, *overrides)
        made = writer(Source.of(cfg), Source.of(cfg).images("train"), tiny, jobs.PATCH, tmp_path / str(i))
        assert made.images_per_shard == expected, override


def test_the_next_process_removes_what_killed_ones_left_of_a_shard(tmp_path):
    folder = tmp_path / "s"
    extract_pixels(folder, part="0/3")
    for name in (".shard-00001.safetensors.host-1", ".plan.json.host-1", "records/.00001.json.elsewhere-2"):
        (folder / name).write_bytes(b"half")
    (folder / ".shard-00002.safetensors.host-1").write_bytes(b"another's")
    extract_pixels(folder, part="1/3")
    assert [path.name for path in folder.rglob(".*")] == [".shard-00002.safetensors.host-1"]
    extract_pixels(folder)
    assert litter(folder) == []


class Counted(jobs.PixelEncoder):
    """Takes every shard but the first before it encodes its own first batch, as other processes do meanwhile."""

    def __init__(self, folder) -> None:
        super().__init__()
        self.folder = folder

    def forward_features(self, images, taps):
        if not self.seen:
            self.seen = 1
            extract_pixels(self.folder, part="1/2")
        return super().forward_features(images, taps)


def test_progress_counts_the_pictures_of_all_processes(tmp_path, monkeypatch):
    """Also those that others encode while this one does: 11 images in shards of 4, of which it does the first."""
    bars = []

    class Bar(extraction.tqdm):
        def __init__(self, *args, **options) -> None:
            bars.append(self)
            self.seen = []
            super().__init__(*args, **options)

        def update(self, n=1):
            super().update(n)
            self.seen.append(self.n)

    monkeypatch.setattr(extraction, "tqdm", Bar)
    extract_pixels(tmp_path / "s", encoder=Counted(tmp_path / "s"), batch_size=2)
    assert list(dict.fromkeys(bars[0].seen)) == [0, 2, 4, 11]
