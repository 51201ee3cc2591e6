"""The members of tar files: those of Python's tarfile, and what is broken."""

import gzip
import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lightning.data import DataError
from sae_lightning.data.tar_index import CutShortError, members
from tests.data.making import write_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
SMALL = {"a/b.jpg": b"x" * 600, "a/b.cls": b"3", "empty.txt": b"", "a/ü.png": b"y" * 512}


def listed(path):
    return list(members(path))


def expected(path):
    with tarfile.open(path) as tar:
        return [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.text(st.sampled_from("ab/é.x"), min_size=1, max_size=130).map(lambda n: n.strip("/") or "z"),
                    st.binary(max_size=1100), max_size=8),
    st.sampled_from(["gnu", "pax"]),
)  # fmt: skip
def test_the_members_are_those_of_tarfile(tmp_path_factory, held, form):
    path = write_tar(tmp_path_factory.mktemp("tar") / "x.tar", {"first": b"1"} | held, FORMATS[form])
    assert listed(path) == expected(path)


@pytest.mark.parametrize("form", FORMATS)
def test_long_names_folders_and_times(tmp_path, form):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=FORMATS[form]) as tar:
        for name, size in (("dir", None), ("dir/" + "n" * 90 + ".jpg", 700), ("p" * 90 + "/" + "q" * 90, 5)):
            info = tarfile.TarInfo(name)
            info.mtime = 1.5 if form == "pax" else 1
            if size is None:
                info.type = tarfile.DIRTYPE
            info.size = size or 0
            tar.addfile(info, io.BytesIO(b"x" * info.size))
    assert listed(path) == expected(path)


def test_global_pax_headers_are_passed_over(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "made by a test"}) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert listed(path) == expected(path)


def test_sizes_beyond_octal_are_read(tmp_path):
    header = tarfile.TarInfo("huge.jpg")
    header.size = 9 << 30
    path = tmp_path / "x.tar"
    with path.open("wb") as file:  # a sparse file on disk, so that it costs nothing
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + (9 << 30) + 1024)
    assert listed(path) == [("huge.jpg", 512, 9 << 30)]


def test_links_are_the_files_they_lead_to(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a/one.jpg")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"data"))
        tar.addfile(info, io.BytesIO(b"news"))  # the same name again
        for name, kind, target in (
            ("b/hard.jpg", tarfile.LNKTYPE, "a/one.jpg"), ("a/soft.jpg", tarfile.SYMTYPE, "one.jpg"),
            ("lost.jpg", tarfile.SYMTYPE, "nowhere"),
        ):  # fmt: skip
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
    first, second = expected(path)
    assert listed(path) == [first, *((name, *second[1:]) for name in ("a/one.jpg", "b/hard.jpg", "a/soft.jpg"))]


def test_old_tars_without_magic_are_read(tmp_path):
    path = write_tar(tmp_path / "x.tar", SMALL, tarfile.USTAR_FORMAT)
    data = bytearray(path.read_bytes())
    for _, offset, _ in expected(path):
        header = bytearray(data[offset - 512 : offset])
        header[257:512] = bytes(255)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data[offset - 512 : offset] = header
    path.write_bytes(data)
    assert listed(path) == expected(path)


@pytest.mark.parametrize("form", FORMATS)
def test_every_truncation_within_a_member_is_told(tmp_path, form):
    path = write_tar(tmp_path / "x.tar", SMALL, FORMATS[form])
    data = path.read_bytes()
    last = expected(path)[-1]
    for end in (513, 700, 1030, last[1] - 300, last[1] + last[2] - 1):
        path.write_bytes(data[:end])
        with pytest.raises(DataError, match=r"x\.tar ends .* truncated"):
            listed(path)


def with_link(path):
    """With a link, which leads to bytes before it."""
    with tarfile.open(path, "w") as tar:
        for name, data in SMALL.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("a/soft.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "b.jpg"
        tar.addfile(link)
        info = tarfile.TarInfo("last.jpg")
        info.size = 700
        tar.addfile(info, io.BytesIO(b"z" * 700))
    return path


@pytest.mark.parametrize("form", [*FORMATS, "with a link"])
def test_every_cut_that_may_have_lost_something_is_told(tmp_path, form):
    """Also between members and in the padding of one; a single zero after the last one is enough to know the end."""
    path = tmp_path / "x.tar"
    path = with_link(path) if form == "with a link" else write_tar(path, SMALL, FORMATS[form])
    data = path.read_bytes()
    whole = listed(path)
    end = -(-(whole[-1].offset + whole[-1].size) // 512) * 512
    for at in sorted({*range(0, end, 177), *range(0, end + 1, 512), end - 1, whole[-1].offset + whole[-1].size}):
        path.write_bytes(data[:at])
        got = []
        with pytest.raises(CutShortError, match=r"x\.tar (ends|is) .*(truncated|empty)"):
            got.extend(members(path))
        assert got == whole[: len(got)]
        assert all(m.offset + m.size > at for m in whole[len(got) : len(got) + 1] if m.name != "a/soft.jpg")
    for at in (end + 1, end + 512, end + 1000):
        path.write_bytes(data[:at])
        assert listed(path) == whole


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty, not a tar"),
        (bytes(1024), "is empty, not a tar"),
        (gzip.compress(b"x" * 4000 + bytes(range(256)) * 20), "is compressed; unpack"),
        (b"plain text " * 200, "truncated or no tar file"),
    ],
)
def test_what_is_no_tar_is_told(tmp_path, content, sentence):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(DataError, match=rf"x\.tar .*{sentence}|x\.tar {sentence}"):
        listed(tmp_path / "x.tar")
