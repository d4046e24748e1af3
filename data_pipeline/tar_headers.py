"""Reads a tar from front to back, member by member, and refuses what is cut off, damaged or made to do harm.

Headers are decoded by Python's tarfile, but its loop over them is not used: it ends without a word where a
tar is cut off between two members, recurses along chains of extended headers, and some versions parse those
in quadratic time and memory (CVE-2024-6232). Nothing is ever extracted; a name is data, whatever it says.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import IO, NamedTuple

from data_pipeline.fault import UserError

BLOCK = tarfile.BLOCKSIZE
PIECE = 1 << 20  # bytes read at once
MAX_EXTENDED = 1 << 20  # bytes of extended headers in front of one member, and no more than so many of each:
MAX_HEADERS, MAX_RECORDS = 16, 1000
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
GNU_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
VOLUME_LABEL = b"V"  # GNU tar --label
UNSAFE_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
NO_TAR = {
    b"\x1f\x8b": "compressed with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\xfd7zXZ": "compressed with xz",
    b"BZh": "compressed with bzip2",
    b"PK": "a zip archive",
    b"<": "a web page (HTML), no tar: its download went wrong",
    b"version https://git-lfs": "a pointer of git-lfs, not the file itself",
}
COPY = "copy or download it again from where it was whole, or write it again"
REPACK = "write the tar again with plain files only, or leave this shard out"

Wanted = Callable[[str], int]  # how many of the first bytes of a member of this name are asked for


class Member(NamedTuple):
    """A plain file of a tar: where its bytes lie, and their CRC-32."""

    name: str  # what is not UTF-8 in it is written as \xNN
    offset: int
    size: int
    crc32: int
    data: bytes | None  # what was wanted of them


class Extended(NamedTuple):
    """What extended headers (PAX, GNU) say of the member behind them."""

    name: str = ""
    size: int | None = None
    sparse: bool = False
    bytes: int = 0
    headers: int = 0


class TarReader:
    """One pass over a tar; the SHA-256 of the file is known when the pass is through."""

    def __init__(self, file: IO[bytes], shard: str) -> None:
        self._file, self._shard = file, shard
        self._digest = sha256()
        self.offset = 0
        self.size = os.fstat(file.fileno()).st_size

    @property
    def sha256(self) -> str:
        """SHA-256 in hex of what was read so far."""
        return self._digest.hexdigest()

    def members(self, wanted: Wanted) -> Iterator[Member]:
        """The plain files in the order of the tar; DATA or UNSAFE, with the place, for anything else."""
        if not self.size:
            raise self.fault("is empty: 0 bytes", at=0)
        said = Extended()
        count = 0
        while (header := self._header(said, count)) is not None:
            at = self.offset - BLOCK
            if header.type in (*PAX, *GNU_LONG, tarfile.XGLTYPE):
                said = self._extended(header, said, at)
                continue
            name, size = said.name or _readable(header.name), header.size if said.size is None else said.size
            kind = UNSAFE_KINDS.get(header.type, "a sparse file" if said.sparse else "")
            if kind:
                what = f"holds {kind}: member {name!r}"
                raise self.fault(what, at=at, member=name, mend=REPACK, code="UNSAFE")
            if header.type not in (*REGULAR, tarfile.DIRTYPE, VOLUME_LABEL):
                what = f"holds member {name!r} of the unknown kind {header.type!r}"
                raise self.fault(what, at=at, member=name, mend=REPACK)
            said = Extended()
            count += 1
            if header.type in REGULAR:
                yield self._member(name, size, at, wanted(name))

    def _header(self, said: Extended, count: int) -> tarfile.TarInfo | None:
        """The next header; None behind the last member, when all that follows has been read."""
        at, block = self.offset, self._read(BLOCK)
        if not block:
            what = f"has no end-of-archive blocks: it ends behind {count} members, and more may be missing"
            raise self.fault(what, at=at)
        if block.count(0) == BLOCK:
            if said.headers:
                raise self.fault("ends behind an extended header whose member is missing", at=at)
            self._end(at)
            return None
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.TarError, ValueError, OverflowError) as error:
            kind = next((kind for magic, kind in NO_TAR.items() if _starts(block, magic)), "")
            if at == 0 and kind:
                mend = "shards are tars that are not compressed: " + COPY
                raise self.fault(f"is {kind}", at=at, mend=mend) from None
            what = "is no tar" if at == 0 else f"has a damaged header behind {count} members"
            if at > 0 and len(block) < BLOCK:
                what = f"is cut off inside a header, behind {count} members"
            raise self.fault(f"{what}: {error}", at=at) from None

    def _end(self, at: int) -> None:
        """Zeros up to the end of the file; members behind the mark would be lost without a word."""
        while piece := self._read(PIECE):
            if piece.count(0) != len(piece):
                raise self.fault(
                    "goes on behind its end-of-archive mark",
                    at=at,
                    mend="tars that were joined with cat: join them with tar --concatenate; else " + COPY,
                )

    def _extended(self, header: tarfile.TarInfo, said: Extended, at: int) -> Extended:
        total = said.bytes + header.size
        if not 0 <= header.size <= total <= MAX_EXTENDED or said.headers == MAX_HEADERS:
            what = f"more than {MAX_EXTENDED} bytes or {MAX_HEADERS} extended headers in front of one member"
            raise self.fault(f"has {what}", at=at)
        data = self._read(header.size)
        if len(data) < header.size or len(self._read(-header.size % BLOCK)) < -header.size % BLOCK:
            raise self.fault("is cut off inside an extended header", at=at)
        said = said._replace(bytes=total, headers=said.headers + 1)
        if header.type == tarfile.GNUTYPE_LONGLINK:
            return said
        if header.type == tarfile.GNUTYPE_LONGNAME:
            return said._replace(name=_decoded(data.partition(b"\0")[0]))
        try:
            records = pax_records(data)
            size = pax_size(records)
        except ValueError as error:
            raise self.fault(f"has a damaged extended header: {error}", at=at) from None
        sparse = any(name.startswith(b"GNU.sparse.") for name in records)
        if header.type == tarfile.XGLTYPE:
            if sparse or b"path" in records or size is not None:
                raise self.fault("has a global header that gives all members one name or size", at=at)
            return said
        name = _decoded(records[b"path"]) if b"path" in records else said.name
        return said._replace(name=name, size=size, sparse=sparse)

    def _member(self, name: str, size: int, at: int, wanted: int) -> Member:
        offset = self.offset
        if size < 0 or size > self.size:
            what = f"member {name!r} says that it has {size} bytes, in a tar of {self.size}"
            raise self.fault(what, at=at, member=name)
        if offset + size > self.size:
            what = f"is cut off inside member {name!r}: {self.size - offset} of its {size} bytes are there"
            raise self.fault(what, at=at, member=name)
        crc32, left, kept, missing = 0, size, [], wanted
        while left:
            piece = self._read(min(left, PIECE))
            if not piece:
                raise self.fault(f"became shorter while member {name!r} was read", at=at, member=name)
            crc32, left = zlib.crc32(piece, crc32), left - len(piece)
            if missing > 0:
                kept.append(piece[:missing])
                missing -= len(piece)
        self._read(-size % BLOCK)
        return Member(name, offset, size, crc32, b"".join(kept) if wanted else None)

    def _read(self, count: int) -> bytes:
        data = self._file.read(count)
        self._digest.update(data)
        self.offset += len(data)
        return data

    def fault(
        self, what: str, *, at: int, member: str = "", mend: str = COPY, code: str = "DATA"
    ) -> UserError:
        """What is wrong at the byte `at` of this tar, with its place."""
        named: dict[str, object] = {"member": member[:200]} if member else {}
        place = {"shard": self._shard, **named, "offset": at}
        return UserError(f"'{self._shard}' {what[:1000]} (at byte {at})", mend=mend, code=code, place=place)


def pax_records(data: bytes) -> dict[bytes, bytes]:
    """The records LENGTH NAME=VALUE of a PAX header, one a line; ValueError where one is not that."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 10)
        digits = data[at:space] if space > at else b""
        end = at + int(digits) if digits.isdigit() else 0
        name, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not space < end <= len(data) or data[end - 1 : end] != b"\n" or not equals or not name:
            raise ValueError(f"no record at its byte {at}")
        if len(records) == MAX_RECORDS:
            raise ValueError(f"more than {MAX_RECORDS} records")
        records[name], at = value, end
    return records


def pax_size(records: dict[bytes, bytes]) -> int | None:
    """The size that a PAX header gives its member, if it gives one."""
    text = records.get(b"size")
    if text is not None and not (text.isdigit() and len(text) <= 20):
        raise ValueError(f"the size {text[:20]!r}")
    return None if text is None else int(text)


def _starts(block: bytes, magic: bytes) -> bool:
    return (block.lstrip() if magic == b"<" else block).startswith(magic)


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _readable(name: str) -> str:
    return name if name.isascii() else _decoded(name.encode("utf-8", "surrogateescape"))
