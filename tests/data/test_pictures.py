"""Pictures of every depth, sample format and number of channels have the pixels that are meant, or say why not."""

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, PngImagePlugin

from sae_lightning.data import DataError, ImageData, load_images
from sae_lightning.data.decode import to_rgb
from sae_lightning.data.errors import begin_anew
from sae_lightning.data.levels import Reading
from tests.data.making import folder_cfg, hf_cfg, pixels, write_pictures

LIGHT = np.linspace(0, 1, 24 * 32).reshape(24, 32)
COLOUR = Image.fromarray(pixels(0))
COLOURS = np.stack([LIGHT, LIGHT**2, 1 - LIGHT], -1)


@pytest.fixture(autouse=True)
def _nothing_said_yet():
    begin_anew()


def told(recwarn) -> str:
    return " ".join(str(warning.message) for warning in recwarn)


def seen(source, **reading) -> np.ndarray:
    """The picture as [H, W, 3] of 0 to 1."""
    return np.asarray(to_rgb(source, "x", Reading(**reading))) / 255


def check(source, expected, **reading):
    expected = expected if expected.ndim == 3 else expected[..., None]
    assert np.abs(seen(source, **reading) - expected).max() <= 1 / 255 + 1e-6


def tiff(values, **options) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, values, **options)
    return out.getvalue()


def saved(picture, kind="TIFF", **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def of(dtype: str, white: float, black: float = 0) -> np.ndarray:
    """``LIGHT`` in another type, from ``black`` to ``white``."""
    values = black + LIGHT * (white - black)
    return (values if dtype[0] == "f" else np.round(values)).astype(dtype)


GREY = {
    "8 bits": of("u1", 255), "16 bits": of("u2", 65535), "12 in 16 bits": of("u2", 4095), "10 in 16": of("u2", 1023),
    "14 in 16": of("u2", 16383), "8 in 16": of("u2", 255), "signed 8": of("i1", 127, -128),
    "signed 16": of("i2", 32767, -32768), "signed 12 in 16": of("i2", 2047, -2048), "12 in signed 16": of("i2", 4095),
    "15 in signed 16": of("i2", 32767), "32 bits": of("u4", 2**32 - 1), "8 in signed 32": of("i4", 255),
    "16 in 32": of("u4", 65535), "signed 32": of("i4", 2**31 - 1, -(2**31)), "8 in 64": of("u8", 255),
    "21 in 32": of("i4", 1_500_000, 500_000), "floats to 1": of("f4", 1), "doubles to 1": of("f8", 1),
    "halves to 1": of("f2", 1), "floats to 255": of("f4", 255), "floats to 65535": of("f4", 65535),
    "floats from -1": of("f4", 1, -1),
    "floats of heights": of("f4", 3_500_000, -100_000), "tiny floats": of("f4", 1e-3),
}  # fmt: skip


@pytest.mark.parametrize("kind", GREY)
def test_grey_tiffs_of_every_depth_are_scaled_as_they_are_meant(kind):
    for options in ({}, {"byteorder": ">"}, {"compression": "zlib"}):
        check(tiff(GREY[kind], photometric="minisblack", **options), LIGHT)
    check(tiff(GREY[kind], photometric="miniswhite"), 1 - LIGHT)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "packbits", "tiff_adobe_deflate"])
def test_compressed_tiffs_are_scaled_alike(compression):
    for kind, white in (("u1", 255), ("u2", 65535), ("u2", 4095), ("i4", 255), ("f4", 1), ("f4", 65535)):
        picture = Image.fromarray(of(kind, white))
        check(saved(picture, compression=compression), LIGHT)
        if kind != "i4":  # Pillow does not write these
            zero_is_white = saved(picture, compression=compression, tiffinfo={262: 0})
            check(zero_is_white, LIGHT if kind == "u1" else 1 - LIGHT)  # it writes 8 bits as they are meant


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 10, 12, 14])
@pytest.mark.parametrize("photometric", [0, 1])
def test_packed_samples_of_few_bits(bits, photometric):
    levels = np.round(LIGHT * (2**bits - 1)).astype(int)
    rows = ["".join(f"{v:0{bits}b}" for v in row) for row in levels]
    data = b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
    tags = [
        (256, 32),
        (257, 24),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, 24),
        (279, len(data)),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    source = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)
    light = levels / (2**bits - 1)
    check(source, light if photometric else 1 - light)


@pytest.mark.parametrize(
    ("dtype", "white"), [("u1", 255), ("u2", 65535), ("u2", 4095), ("f4", 1), ("f8", 1), ("f4", 255)]
)
def test_colours_are_scaled_together(dtype, white):
    values = COLOURS * white
    values = (values if dtype[0] == "f" else np.round(values)).astype(dtype)
    apart = np.ascontiguousarray(np.moveaxis(values, -1, 0))
    check(tiff(values, photometric="rgb"), COLOURS)
    check(tiff(values, photometric="rgb", tile=(16, 16)), COLOURS)
    check(tiff(apart, photometric="rgb", planarconfig="separate"), COLOURS)


def test_other_colour_models():
    inks = np.concatenate([np.round(COLOURS * 65535), np.zeros((24, 32, 1))], -1).astype("u2")
    check(tiff(inks, photometric="separated"), 1 - COLOURS)
    table = np.stack([np.arange(256) * 257, np.arange(256)[::-1] * 257, np.full(256, 514)]).astype("u2")
    check(
        tiff(of("u1", 255), photometric="palette", colormap=table),
        np.stack([LIGHT, 1 - LIGHT, LIGHT * 0 + 2 / 255], -1),
    )
    for mode in ("YCbCr", "CMYK", "RGB"):
        picture = Image.fromarray(pixels(0)).convert(mode)
        check(saved(picture, compression="tiff_lzw"), np.asarray(picture.convert("RGB")) / 255)
    grey = Image.fromarray(np.full((4, 4, 3), 118, np.uint8))  # a lightness of 50 %
    check(saved(Image.frombytes("LAB", (4, 4), bytes([127, 0, 0] * 16))), np.asarray(grey) / 255)


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits, [H, W, C]."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2]]
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("white", [65535, 4095])
def test_pngs_of_16_bits_keep_them(white):
    values = np.round(COLOURS * white).astype("u2")
    check(deep_png(values), COLOURS)
    check(deep_png(values[..., :1]), LIGHT)
    check(deep_png(values[..., :2]), LIGHT)
    check(deep_png(np.concatenate([values, values[..., :1]], -1)), COLOURS)
    check(deep_png(values), COLOURS[..., [2, 1, 1]], channels=(2, 1, 1))


def test_greymaps_and_pictures_in_memory():
    for values in (of("u2", 65535), of("u2", 4095)):
        check(saved(Image.fromarray(values), "PPM"), LIGHT)
        check(Image.fromarray(values), LIGHT)
    check(b"P5 32 24 4095\n" + of(">u2", 4095).tobytes(), LIGHT)
    check(b"P5 32 24 4095\n" + of(">u2", 255).tobytes(), LIGHT / 16)  # its header tells that it is dark
    check(Image.fromarray(of("f4", 1)), LIGHT)
    check(Image.fromarray(of("i4", 65535)), LIGHT)


def test_floats_may_overshoot_and_lack_values():
    wide = LIGHT * 1.06 - 0.03
    check(tiff(wide.astype("f4")), wide.clip(0, 1))
    holes = np.where(LIGHT > 0.5, np.nan, LIGHT)
    check(tiff(holes), np.nan_to_num(holes))


def test_what_is_white_can_be_said():
    check(tiff(of("u2", 65535)), np.minimum(LIGHT * 2, 1), white=32767.5)
    check(tiff(of("i2", 1000, -1000)), LIGHT, white=1000)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (tiff(of("u2", 4095)), "16-bit integers (first: 'x') are read with 0 as black and 4095 as white, as 12 bits"),
        (tiff(of("f4", 5e6)), "32-bit floats (first: 'x') are read with 0 as black and 5e+06 as white, by the pic"),
        (tiff(of("u1", 255)), "with 1 channel (first: 'x') are read as grey, given as three equal channels;"),
        (saved(COLOUR.convert("RGBA"), "PNG"), "with 4 channels (first: 'x') are read as red, green and blue, and 1"),
        (tiff(np.zeros((8, 8, 2), "u1"), photometric="minisblack", planarconfig="contig"), "with 2 channels (first"),
        (tiff(np.zeros((8, 8, 5), "u1"), photometric="rgb"), "with 5 channels (first: 'x') are read as red, green"),
        (saved(COLOUR.convert("LA"), "PNG"), "with 2 channels (first: 'x') are read as grey, given as three equal"),
    ],
)  # fmt: skip
def test_what_is_made_of_unusual_pictures_is_said_once(source, sentence, recwarn):
    for _ in range(2):
        to_rgb(source, "x")
    assert told(recwarn).count(sentence) == 1


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PNG", "WEBP", "AVIF"])
def test_of_several_frames_the_first_is_read_and_said(kind, recwarn):
    first, second = (Image.new("RGB", (32, 24), colour) for colour in ("red", "blue"))
    data = saved(first, kind, save_all=True, append_images=[second])
    assert np.abs(seen(data) - [1, 0, 0]).max() < 0.05
    to_rgb(data, "y")
    assert told(recwarn).count("several frames or pages (first: 'x') the first is read") == 1


def test_clipping_nearly_all_is_a_warning(recwarn):
    for name in "xy":
        to_rgb(tiff(of("f4", 255)), name, Reading(white=1))
    said = told(recwarn)
    assert said.count("99% of the values of image 'x' lie beyond black (0) or white (1), as data.white says") == 1
    assert "'y'" not in said


def bands(dtype="u2", count=13):
    return np.round(np.stack([LIGHT * (i + 1) / count for i in range(count)], -1) * 65535).astype(dtype)


def test_three_of_many_channels_can_be_chosen():
    expected = (bands() / 65535)[..., [12, 4, 0]]
    for options in ({}, {"compression": "zlib"}):
        check(tiff(bands(), photometric="minisblack", planarconfig="contig", **options), expected, channels=(12, 4, 0))
    apart = np.ascontiguousarray(np.moveaxis(bands(), -1, 0))
    check(tiff(apart, photometric="minisblack", planarconfig="separate"), expected, channels=(12, 4, 0))
    with pytest.raises(DataError, match=r"'x' has 13 channels; choose .* with data\.channels="):
        seen(tiff(bands(), photometric="minisblack", planarconfig="contig"))
    with pytest.raises(DataError, match=r"'x' has 13 channels, counted from 0; data\.channels=\[13, 0, 0\]"):
        seen(tiff(bands(), photometric="minisblack", planarconfig="contig"), channels=(13, 0, 0))
    four = np.concatenate([COLOURS, COLOURS[..., :1]], -1)  # red, green, blue and infrared
    near = tiff(np.round(four * 255).astype("u1"), photometric="rgb", extrasamples=["unspecified"])
    check(near, COLOURS)
    check(near, four[..., [3, 2, 2]], channels=(3, 2, 2))


@pytest.mark.parametrize("source", ["folder", "hf", "stream"])
def test_channels_and_white_are_settings_of_the_data(source, tmp_path):
    write_pictures(tmp_path, *(f"train/{c}/{i}.png" for c in "ab" for i in range(4)))
    cfg = (
        folder_cfg(tmp_path)
        if source == "folder"
        else hf_cfg(
            tmp_path,
            streaming=source == "stream",
            held_out=0.0,
            splits={"train": "train", "val": "train", "test": "train"},
        )
    )
    plain, turned = (load_images(cfg | other, "train") for other in ({}, {"channels": [2, 1, 0]}))

    def first(images):
        return (
            images[0]
            if isinstance(images, ImageData)
            else to_rgb(*[(i := next(images.items())).image, i.image_id, i.reading])
        )

    assert (np.asarray(first(turned)) == np.asarray(first(plain))[..., ::-1]).all()
    assert plain.fingerprint != turned.fingerprint
    assert plain.fingerprint == load_images(cfg | {"channels": None, "white": None}, "train").fingerprint
    for wrong, sentence in (
        ({"channels": [0, 1]}, r"data\.channels=\[0, 1\] must be three"),
        ({"white": 0}, r"data\.white=0 must be"),
    ):
        with pytest.raises(DataError, match=sentence):
            load_images(cfg | wrong, "train")


def annotated(add, size=3_000_000) -> bytes:
    about = PngImagePlugin.PngInfo()
    add(about, "x" * size)
    return saved(Image.fromarray(pixels(0)), "PNG", pnginfo=about)


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray(pixels(0)), "PNG", icc_profile=bytes(3_000_000)),
        annotated(lambda about, text: about.add_text("a", text, zip=True)),
        annotated(lambda about, text: about.add_itxt("XML:com.adobe.xmp", text, zip=True)),
        annotated(lambda about, text: about.add_itxt("XML:com.adobe.xmp", text)),
        annotated(lambda about, text: about.add(b"tEXt", b"a\0" + text.encode(), after_idat=True)),
        annotated(lambda about, text: about.add_text("a", text, zip=True), 200_000_000),
        annotated(lambda about, text: about.add(b"zTXt", b"a\0\0no zlib"), 1),
    ],
    ids=["profile", "text", "XMP", "plain XMP", "text at the end", "bomb", "broken text"],
)  # fmt: skip
def test_metadata_of_pngs_is_passed_over(data):
    check(data, pixels(0) / 255)


def damaged(kind: str) -> bytes:
    data = bytearray(saved(Image.fromarray(pixels(0, 64)), kind))
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(200)
    return bytes(data[:-50])


BROKEN = {
    "AVIF": damaged("AVIF"), "WEBP": damaged("WEBP"), "cut TIFF": tiff(of("f4", 1))[:-100],
    "TIFF without its directory": tiff(of("f4", 1))[:100], "TIFF of no numbers": tiff(np.full((4, 4), np.nan, "f4")),
    "complex TIFF": tiff(LIGHT.astype("c8")),
    "a volume": tiff(np.zeros((16, 16, 16), "u2"), volumetric=True, tile=(16, 16, 16)),
    "TIFF of tags that do not end": saved(COLOUR).replace(
        struct.pack("<HHI", 256, 4, 1), struct.pack("<HHI", 256, 4, 2**31)
    ),
    "long": saved(Image.new("L", (60000, 1)), "PNG"), "tall": saved(Image.new("RGB", (3, 4000)), "PNG"),
    "long floats": tiff(np.zeros((2, 4000))), "empty": b"", "a text": b"no picture",
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_whatever_goes_wrong_names_the_picture(kind):
    with pytest.raises(DataError, match=r"^Image 'x' "):
        to_rgb(BROKEN[kind], "x")
