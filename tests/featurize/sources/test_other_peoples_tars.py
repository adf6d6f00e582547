"""Tars as other people have them: links, archives one after another, sizes that cannot be; each ends at once."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from featurize.errors import UserError
from featurize.images.reasons import BadImage
from featurize.sources import read
from tests.featurize.sources.test_other_peoples_data import captions, labels, listed
from tests.featurize.sources.test_shards import png, tar_of


def test_links_and_names_of_the_faults(real_data: Path) -> None:
    images = listed(f"wds:{real_data}/faults/links.tar").images
    assert [image.key for image in images] == ["a", "b", "c"]
    assert len({read(image) for image in images}) == 1
    images = listed(f"wds:{real_data}/faults/latin1_name.tar").images
    assert [image.key for image in images] == ["1", r"caf\xe9"]
    assert read(images[0]) == read(images[1])


def test_links_lead_to_members_and_what_is_no_file_is_remarked(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind, target in (
            ("d/1.png", tarfile.REGTYPE, ""),
            ("d/1.txt", tarfile.REGTYPE, ""),
            ("d/2.png", tarfile.SYMTYPE, "1.png"),
            ("d/2.txt", tarfile.LNKTYPE, "d/1.txt"),
            ("3.png", tarfile.SYMTYPE, "d/2.png"),
            ("4.png", tarfile.SYMTYPE, "/etc/passwd"),
            ("5.png", tarfile.SYMTYPE, "5.png"),
            ("6.png", tarfile.FIFOTYPE, ""),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            content = {"d/1.png": png(1), "d/1.txt": b"one"}.get(name, b"")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    listing = listed(f"wds:{tmp_path}/a.tar")
    assert captions(listing) == {"d/1": ("one",), "d/2": ("one",), "3": ()}
    assert [read(image) for image in listing.images] == [png(1)] * 3
    told = " ".join(listing.remarks)
    assert "2 links lead to no file of their shard, and were passed over (first: 4.png" in told
    assert "1 members are sparse or are no files, and were passed over (first: 6.png" in told


def test_archives_one_after_another_are_all_read(tmp_path: Path) -> None:
    one = tar_of(tmp_path / "1.tar", ("1.png", png(1)), ("1.cls", b"1")).read_bytes()
    two = tar_of(tmp_path / "2.tar", ("2.png", png(2)), ("2.cls", b"2")).read_bytes()
    (tmp_path / "a.tar").write_bytes(one + two)
    listing = listed(f"wds:{tmp_path}/a.tar")
    assert labels(listing) == {"1": 1, "2": 2}
    assert [read(image) for image in listing.images] == [png(1), png(2)]
    assert "1 shards hold several archives, one after another, and all were read" in listing.remarks[0]
    (tmp_path / "a.tar").write_bytes(one + b"signature")
    listing = listed(f"wds:{tmp_path}/a.tar")
    assert labels(listing) == {"1": 1}
    assert "bytes after their end that are no archive" in listing.remarks[0]
    (tmp_path / "a.tar").write_bytes(one + two[:700])
    with pytest.raises(UserError, match=r"a\.tar ends early or is damaged"):
        listed(f"wds:{tmp_path}/a.tar")


def header(name: str, size: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header with a true checksum and any size, as `TarInfo.tobuf` would not write it."""
    entry = tarfile.TarInfo(name)
    entry.type = kind
    block = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


NEGATIVE = b"\xff" * 11 + b"\x00"  # -256, in base 256
TERABYTES = b"\x80" + bytes(5) + b"\x50" + bytes(5)


@pytest.mark.parametrize("size", [NEGATIVE, TERABYTES])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE])
def test_a_size_that_cannot_be_ends_in_a_sentence_at_once(tmp_path: Path, size: bytes, kind: bytes) -> None:
    """CVE-2025-8194: in some versions of Python tarfile goes round for ever; and it reads headers of any size into memory."""
    whole = tar_of(tmp_path / "a.tar", ("1.png", png(1)))
    data = whole.read_bytes()
    whole.write_bytes(header("x.png", size, kind) + data)
    with pytest.raises(UserError, match=r"a\.tar ends early or is damaged after 0 members"):
        listed(f"wds:{whole}")


def test_a_negative_size_in_a_pax_header(tmp_path: Path) -> None:
    record = b"13 size=-512\n"
    extended = header("p", b"%011o\0" % len(record), tarfile.XHDTYPE) + record.ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(extended + header("x.png", b"%011o\0" % 0) + bytes(10240))
    with pytest.raises(UserError, match=r"ends early or is damaged"):
        listed(f"wds:{tmp_path}/a.tar")


def test_an_image_of_20_gb_is_refused_and_a_caption_passed_over(tmp_path: Path) -> None:
    size = 20 * 10**9
    with open(tmp_path / "a.tar", "wb") as file:  # with holes, so that it takes no space
        for name in ("1.txt", "1.png", "2.png"):
            big = name != "2.png"
            content = b"" if big else png(2)
            entry = tarfile.TarInfo(name)
            entry.size = size if big else len(content)
            file.write(entry.tobuf(tarfile.GNU_FORMAT) + content)
            file.seek((-entry.size if not big else -size) % 512 + (size if big else 0), os.SEEK_CUR)
        file.write(bytes(1024))
    first, second = (listing := listed(f"wds:{tmp_path}/a.tar")).images
    assert "1 labels or captions have more than 16 MB" in listing.remarks[0]
    with pytest.raises(BadImage, match=r"the file has 20\.0 GB, more than the 1\.1 that are read"):
        read(first)
    assert read(second) == png(2)


def test_damage_in_a_local_tar_is_not_the_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def broken(*_: object) -> None:
        tries.append(1)
        raise ValueError("odd header")

    monkeypatch.setattr("tarfile.TarFile.next", broken)
    shard = tar_of(tmp_path / "a.tar", ("1.png", png(1)))
    with pytest.raises(UserError, match=r"damaged after 0 members \(odd header\); copy it again"):
        listed(f"wds:{shard}")
    assert len(tries) == 1
