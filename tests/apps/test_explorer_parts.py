"""The explorer without its server: order and filters, bands, figures of latents, and uploaded pictures."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from scipy.sparse import csr_matrix

from sae_lightning.apps.explorer.run_view import latent_figures, percentiles
from sae_lightning.apps.explorer.uploads import KEPT, SIDE, RefusedError, Uploads, read_picture
from sae_lightning.apps.explorer.views import choose
from sae_lightning.evaluation.by_latent import ImagesOfLatents
from sae_lightning.rendering.pictures import thumbnail

NAMES = ["", "cat", "Black cat", "truck", "black truck"]


def codes_of(seed: int, n: int = 30, d_sae: int = 12, share: float = 0.3) -> csr_matrix:
    """Sparse positive codes; latent 0 never fires."""
    rng = np.random.default_rng(seed)
    dense = np.where(rng.random((n, d_sae)) < share, rng.integers(1, 6, (n, d_sae)) / 2, 0).astype(np.float32)
    dense[:, 0] = 0
    return csr_matrix(dense)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from([math.nan, -1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=12),
    seed=st.integers(0, 999),
    text=st.sampled_from(["", "cat", "BLACK", "truck black", "#3", "2", "dog", "999999999999"]),
    of_class=st.sampled_from([None, 0, 1]), at_least=st.integers(0, 3), descending=st.booleans(),
)  # fmt: skip
def test_latents_are_chosen_and_sorted_as_a_slow_sort_does(values, seed, text, of_class, at_least, descending):
    rng = np.random.default_rng(seed)
    n = len(values)
    names, label, fired = rng.choice(NAMES, n).tolist(), rng.integers(-1, 2, n), rng.integers(0, 5, n)

    def fits(i: int) -> bool:
        number = text.removeprefix("#")
        named = all(word in names[i].lower() for word in text.lower().split()) or str(i) == number
        return named and fired[i] >= at_least and of_class in (None, label[i])

    def key(i: int) -> tuple[bool, float, int]:
        missing = math.isnan(values[i])
        return missing, 0.0 if missing else -values[i] if descending else values[i], i

    found = choose(
        np.array(values), names, label, fired, text=text, of_class=of_class, at_least=at_least, descending=descending
    )
    assert found.tolist() == sorted(filter(fits, range(n)), key=key)


def test_figures_of_latents_match_counts_over_dense_codes():
    codes, rng = codes_of(1), np.random.default_rng(1)
    dense, labels = codes.toarray(), rng.integers(0, 3, 30)
    embeddings = rng.standard_normal((30, 5)).astype(np.float32)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    found = latent_figures(codes, ImagesOfLatents(codes).top(9), torch.from_numpy(labels), 3, embeddings)
    assert not found.evaluated
    for latent in range(1, 12):
        fired = np.flatnonzero(dense[:, latent])
        counts = np.bincount(labels[fired], minlength=3)
        pairs = [(i, j) for i in range(30) for j in range(i)]
        weight = [dense[i, latent] * dense[j, latent] for i, j in pairs]
        alike = [float(unit[i] @ unit[j]) for i, j in pairs]
        of = {name: column.values[latent] for name, column in found.columns.items()}
        assert of["purity"] == pytest.approx(counts.max() / len(fired))
        assert of["image_share"] == pytest.approx(len(fired) / 30)
        assert of["peak"] == dense[:, latent].max()
        assert of["monoscore"] == pytest.approx(np.average(alike, weights=weight), abs=1e-5)
        assert found.label[latent] == counts.argmax()
    assert math.isnan(found.columns["purity"].values[0])
    assert found.columns["image_share"].values[0] == 0
    assert found.label[0] == -1


def test_an_evaluation_comes_first_and_classes_are_not_told_where_there_is_one():
    codes = codes_of(2)
    scored = torch.ones(12, dtype=torch.bool)
    scored[3] = False
    evaluation = {
        "monoscore": torch.linspace(0, 1, 12).double(), "scored": scored, "moran": torch.full((12,), torch.nan),
        "counts": torch.arange(12), "purity": torch.ones(12), "some_new_figure": torch.arange(12).float(),
    }  # fmt: skip
    labels = torch.zeros(30, dtype=torch.long)
    found = latent_figures(codes, ImagesOfLatents(codes).top(9), labels, 1, np.ones((30, 2)), evaluation, n_tokens=100)
    assert found.evaluated
    assert found.columns["monoscore"].values[5] == pytest.approx(5 / 11)
    assert math.isnan(found.columns["monoscore"].values[3])
    assert found.columns["token_share"].values[7] == pytest.approx(0.07)
    assert found.columns["some_new_figure"].title == "Some new figure"
    assert not any("purity" in name for name in found.columns)
    shares = percentiles(found.columns.values())
    assert np.isnan(shares["moran"]).all()
    assert shares["some_new_figure"][[1, 11]].tolist() == [0, 1]  # latent 0 never fires


# --- pictures -------------------------------------------------------------------------------------
def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def test_uploads_are_read_in_rgb_upright_and_shrunk():
    wide = Image.new("RGB", (2000, 500), "red")
    wide.paste("blue", (0, 0, 1000, 500))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    upright = read_picture(encoded(wide, "JPEG", exif=exif))
    assert upright.mode == "RGB"
    assert upright.size == (256, SIDE)
    assert upright.getpixel((100, 10))[2] > 200
    for kind in ("PNG", "WEBP", "GIF", "BMP"):
        assert read_picture(encoded(Image.new("RGB", (8, 6), "red"), kind)).size == (8, 6)
    assert read_picture(encoded(Image.new("RGBA", (5, 5), (9, 9, 9, 0)))).mode == "RGB"
    assert read_picture(encoded(Image.new("I;16", (5, 5), 65535))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.slow
def test_what_is_no_whole_picture_is_refused():
    whole = encoded(Image.effect_noise((64, 64), 50))
    bomb = encoded(Image.new("1", (30_000, 20_000)))
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * (2 << 20), zip=True)
    cases = [
        (b"", 415), (b"hello", 415), (whole[: len(whole) // 2], 415), (bomb, 413),
        (encoded(Image.new("L", (4, 4)), "TIFF"), 415), (b"%PDF-1.4", 415), (b"<svg/>", 415),
        (encoded(Image.new("L", (4, 4)), pnginfo=text), 415),
    ]  # fmt: skip
    for data, status in cases:
        with pytest.raises(RefusedError) as refused:
            read_picture(data)
        assert refused.value.status == status
        assert "0x" not in str(refused.value)


def test_only_the_last_uploads_are_held():
    uploads = Uploads()
    numbers = [uploads.add(Image.new("RGB", (1, 1), (i, 0, 0))) for i in range(KEPT + 2)]
    assert numbers == list(range(KEPT + 2))
    assert uploads[KEPT + 1].getpixel((0, 0)) == (KEPT + 1, 0, 0)
    for gone in (0, 1, KEPT + 2, -1):
        with pytest.raises(RefusedError, match="upload it again"):
            uploads[gone]


def test_squares_are_centred_and_never_enlarged():
    picture = Image.new("RGB", (300, 100), "red")
    picture.paste("blue", (100, 0, 200, 100))
    assert thumbnail(picture, 96).size == (96, 96)
    assert thumbnail(picture, 288).size == (100, 100)
    assert set(thumbnail(picture, 288).get_flattened_data()) == {(0, 0, 255)}
