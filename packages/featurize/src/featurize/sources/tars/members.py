"""The members of a tar file with their offsets, whatever a stranger put into it: links, archives one after another, damage."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from featurize.errors import UserError
from featurize.io.addresses import File, open_ranged
from featurize.sources.outside_text import Oddities, printable

ANNOTATIONS = ("cls", "txt", "json")
MAX_ANNOTATION = 16 << 20  # bytes of one; a longer one is passed over
MAX_EXTENSION = 1 << 20  # bytes of a header that extends the next one, with a long name for instance
MAX_LINKS = 8  # from link to link
MAX_DEPTH = 3  # tars in tars
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
END_OF_ARCHIVE = 2 * tarfile.BLOCKSIZE  # zero bytes
PIECE = 1 << 16  # bytes read at once of the zeros after an archive
EXTENSIONS_OF_HEADERS = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip


class Member(NamedTuple):
    """A file in the shard; `text` is its content where that is an annotation, `link` the name of the member it stands for."""

    name: str
    offset: int
    size: int
    text: bytes
    link: str = ""


class _Header(tarfile.TarInfo):
    """A header whose size is believed only where it can be: tarfile would read what a negative one or one of gigabytes says."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0 or (self.type in EXTENSIONS_OF_HEADERS and self.size > MAX_EXTENSION):
            raise tarfile.ReadError(f"a header gives the size {self.size}")
        return super()._proc_member(archive)  # type: ignore[misc]


def members_of(shard: File, odd: Oddities) -> list[Member]:
    """The files in a tar file, those that links stand for as well, in its order; what was passed over goes to `odd`.

    Raises UserError for a file that is compressed, cut short or damaged.
    """
    with open_ranged(shard) as file:
        members = list(_members(file, shard, 0, shard.size, odd))
        if any(member.link for member in members):
            members = list(_resolved(file, members, odd))
    return members


def _members(
    file: BinaryIO, shard: File, start: int, end: int, odd: Oddities, folder: str = "", depth: int = 0
) -> Iterator[Member]:
    """The members of the archives between two offsets: of `cat a.tar b.tar` all, though tar itself reads the first only.

    A tar in it, as ImageNet's official one has for each class, is opened too.
    """
    if start == end:
        raise _cut_short(shard, 0, f"{folder.rstrip('/') or 'it'} is empty")
    file.seek(start)
    magic = file.read(6)
    kind = next((kind for mark, kind in COMPRESSED.items() if magic.startswith(mark)), None)
    if kind:
        raise UserError(
            f"The shard {shard.address} is compressed ({kind}), so no picture can be read out of it; unpack it."
        )
    first = start
    while start < end:
        if start > first:
            odd.add("shards hold several archives, one after another, and all were read", folder or shard.address)
        for entry in _entries(file, shard, start, end):
            name, offset, size = folder + printable(entry.name), entry.offset_data, entry.size
            if entry.islnk() or entry.issym():
                # A hard link names its member from the top, a symbolic one from where it lies.
                above = folder if entry.islnk() else posixpath.dirname(name)
                yield Member(name, 0, 0, b"", posixpath.normpath(posixpath.join(above, printable(entry.linkname))))
            elif not entry.isfile() or entry.issparse():
                if not entry.isdir():
                    odd.add("members are sparse or are no files, and were passed over", name)
            elif name.endswith(".tar") and depth < MAX_DEPTH:
                yield from _members(file, shard, offset, offset + size, odd, f"{name.removesuffix('.tar')}/", depth + 1)
            elif not _is_annotation(name):
                yield Member(name, offset, size, b"")
            elif size > MAX_ANNOTATION:
                odd.add("labels or captions have more than 16 MB, and were passed over", name)
            else:
                yield Member(name, offset, size, _read(file, offset, size))
        start = _next_archive(file, end, odd, folder or shard.address)


def _entries(file: BinaryIO, shard: File, start: int, end: int) -> Iterator[tarfile.TarInfo]:
    """The headers of one archive. The file then stands behind its last member and its mark of the end."""
    found, behind = 0, start
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header, encoding="utf-8") as tar:
            while (entry := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps them all, a kilobyte each
                if entry.size < 0 or tar.offset <= behind:  # in some versions of Python an endless loop
                    raise tarfile.ReadError(f"a member has the size {entry.size}")
                if tar.offset > end:
                    raise tarfile.ReadError("unexpected end of data")
                behind = tar.offset
                found += 1
                yield entry
            behind = tar.offset
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError, EOFError, RecursionError, MemoryError) as error:
        # A file that is no tar at all also ends here, with nothing found; and tarfile raises many kinds for a damaged header.
        raise _cut_short(shard, found, str(error) or type(error).__name__) from None
    if behind + END_OF_ARCHIVE > end:
        raise _cut_short(shard, found, "the end-of-archive mark is missing")
    if _read(file, behind, END_OF_ARCHIVE).strip(b"\0"):
        raise _cut_short(shard, found, "the next header is damaged")


def _next_archive(file: BinaryIO, end: int, odd: Oddities, where: str) -> int:
    """Where the next archive starts, after any number of zeros; `end` where there is none."""
    while (start := file.tell()) < end:
        piece = file.read(min(PIECE, end - start))
        if not piece:
            return end
        if piece.strip(b"\0"):
            start += (len(piece) - len(piece.lstrip(b"\0"))) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
            try:
                tarfile.TarInfo.frombuf(_read(file, start, tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
            except tarfile.TarError:
                odd.add("shards have bytes after their end that are no archive, and were passed over", where)
                return end
            return start
    return end


def _resolved(file: BinaryIO, members: list[Member], odd: Oddities) -> Iterator[Member]:
    """The members, where each link has the place and size of the file that it leads to."""
    by_name = {posixpath.normpath(member.name): member for member in members}
    for member in members:
        target: Member | None = member
        for _ in range(MAX_LINKS):
            target = by_name.get(target.link) if target is not None and target.link else target
        if target is None or target.link:
            odd.add("links lead to no file of their shard, and were passed over", member.name)
            continue
        text = target.text
        if member.link and _is_annotation(member.name) and not text:
            text = _read(file, target.offset, min(target.size, MAX_ANNOTATION))
        yield Member(member.name, target.offset, target.size, text)


def _is_annotation(name: str) -> bool:
    return name.rpartition(".")[2].lower() in ANNOTATIONS


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _cut_short(shard: File, found: int, problem: str) -> UserError:
    return UserError(
        f"The shard {shard.address} ends early or is damaged after {found} members ({problem}); copy it again, or leave "
        "it out."
    )
