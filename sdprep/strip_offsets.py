"""Metadata removal for formats whose parts are named by file offsets: TIFF and AVIF.

Nothing moves, so no offset changes: a blank file of the same length receives only the ranges that
decoding needs. What nobody names, such as a maker note or an appended file, stays blank.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from sdprep.exif import ORIENTATION, orientation_of

# --- TIFF ---------------------------------------------------------------------------------------

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_SIZES |= {16: 8, 17: 8, 18: 8}
_TIFF_KEPT = {254, 255, 256, 257, 258, 259, 262, 263, 266, 273, ORIENTATION, 277, 278, 279, 282}
_TIFF_KEPT |= {283, 284, 290, 291, 292, 293, 296, 297, 301, 317, 318, 319, 320, 322, 323, 324, 325}
_TIFF_KEPT |= {332, 334, 336, 338, 339, 340, 341, 347, 529, 530, 531, 532, 34675, 50674}
"""Geometry, coding, colour and the ICC profile (34675); all other tags are dropped."""
_PIXEL_TAGS = ((273, 279), (324, 325))  # offsets and byte counts of strips, of tiles
_OLD_JPEG = 6


@dataclass(frozen=True)
class _Entry:
    tag: int
    kind: int
    count: int
    raw: bytes  # the whole entry
    at: int  # where its value lies
    size: int  # of the value, bytes


class _Tiff:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.order = {b"II": "<", b"MM": ">"}.get(data[:2], "")
        if not self.order:
            raise ValueError("no TIFF header")
        (self.version,) = self._read("H", 2)
        if self.version not in (42, 43):
            raise ValueError("no TIFF header")
        self.is_big = self.version == 43
        self.number, self.entry_size = ("Q", 20) if self.is_big else ("I", 12)
        self.header_size = 16 if self.is_big else 8
        self.count_format = "Q" if self.is_big else "H"

    def _read(self, layout: str, at: int) -> tuple[int, ...]:
        return struct.unpack_from(self.order + layout, self.data, at)

    def first(self) -> int:
        return self._read(self.number, self.header_size - struct.calcsize("=" + self.number))[0]

    def directory(self, at: int) -> tuple[list[_Entry], int]:
        """Entries of the directory at `at`, and the offset of the next one."""
        (num_entries,) = self._read(self.count_format, at)
        start = at + struct.calcsize("=" + self.count_format)
        end = start + num_entries * self.entry_size
        if end > len(self.data):
            raise ValueError("directory runs past the end")
        entries = [self._entry(place) for place in range(start, end, self.entry_size)]
        return entries, self._read(self.number, end)[0]

    def _entry(self, place: int) -> _Entry:
        tag, kind, count = self._read("HH" + self.number, place)
        room = struct.calcsize("=" + self.number)
        size = _SIZES.get(kind, 1) * count
        inline = place + self.entry_size - room
        at = inline if size <= room else self._read(self.number, inline)[0]
        raw = self.data[place : place + self.entry_size]
        return _Entry(tag, kind, count, raw, at, size)

    def values(self, entry: _Entry) -> tuple[int, ...]:
        layout = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}.get(entry.kind)
        if layout is None or entry.at + entry.size > len(self.data):
            raise ValueError(f"tag {entry.tag} is no list of numbers")
        return self._read(f"{entry.count}{layout}", entry.at)


def strip_tiff(data: bytes) -> bytes:
    """Copy header, directories (whitelisted tags only), their values, strips and tiles."""
    tiff = _Tiff(data)
    kept = _Blank(data)
    kept.keep(0, tiff.header_size)
    at, seen, orientation = tiff.first(), set[int](), 1
    while at and at not in seen:
        entries, following = tiff.directory(at)
        by_tag = {entry.tag: entry for entry in entries if entry.tag in _TIFF_KEPT}
        if not seen and ORIENTATION in by_tag:
            orientation = tiff.values(by_tag[ORIENTATION])[0]
        seen.add(at)
        _keep_page(tiff, kept, by_tag)
        raw = b"".join(entry.raw for entry in entries if entry.tag in _TIFF_KEPT)
        table = struct.pack(tiff.order + tiff.count_format, len(raw) // tiff.entry_size) + raw
        if following in seen:
            following = 0
        kept.write(at, table + struct.pack(tiff.order + tiff.number, following))
        at = following
    if orientation_of(data) not in (orientation, 1):
        raise ValueError("the orientation is in XMP alone")
    return kept.result()


def _keep_page(tiff: _Tiff, kept: _Blank, by_tag: dict[int, _Entry]) -> None:
    if 259 in by_tag and tiff.values(by_tag[259])[0] == _OLD_JPEG:
        raise ValueError("old-style JPEG names its tables without their length")
    for entry in by_tag.values():
        if entry.size > struct.calcsize("=" + tiff.number):
            kept.keep(entry.at, entry.size)
    pairs = [pair for pair in _PIXEL_TAGS if pair[0] in by_tag]
    if not pairs or any(lengths not in by_tag for _, lengths in pairs):
        raise ValueError("strips without byte counts")
    for offsets, lengths in pairs:
        starts, sizes = tiff.values(by_tag[offsets]), tiff.values(by_tag[lengths])
        if len(starts) != len(sizes):
            raise ValueError("offsets and byte counts differ in number")
        for start, size in zip(starts, sizes, strict=True):
            kept.keep(start, size)


class _Blank:
    """Zeros in the length of a file, into which ranges are copied at their own place."""

    def __init__(self, data: bytes) -> None:
        self.data, self.out, self.end = data, bytearray(len(data)), 0
        self.budget = 4 * len(data)  # ranges that overlap a thousandfold are an attack

    def keep(self, at: int, size: int) -> None:
        self.budget -= size
        if at + size > len(self.data) or self.budget < 0:
            raise ValueError("ranges run past the end or overlap")
        self.write(at, self.data[at : at + size])

    def write(self, at: int, piece: bytes) -> None:
        self.out[at : at + len(piece)] = piece
        self.end = max(self.end, at + len(piece))

    def result(self) -> bytes:
        return bytes(self.out[: self.end])


# --- AVIF ---------------------------------------------------------------------------------------

_DROPPED_ITEMS = {b"Exif", b"mime", b"uri "}
_BLANK_BOXES = {b"idat", b"free", b"skip", b"uuid", b"udta", b"udes", b"xml "}


@dataclass(frozen=True)
class _Box:
    kind: bytes
    head: int
    start: int  # of the payload
    end: int

    @property
    def payload(self) -> tuple[int, int]:
        return self.start, self.end


def _boxes(data: bytes, position: int, end: int) -> list[_Box]:
    found = []
    while position + 8 <= end:
        length, kind = struct.unpack_from(">I4s", data, position)
        head = 8
        if length == 1:
            (length,), head = struct.unpack_from(">Q", data, position + 8), 16
        stop = end if length == 0 else position + length
        if stop > end or stop < position + head:
            raise ValueError("box runs past the end")
        found.append(_Box(kind, position, position + head, stop))
        position = stop
    return found


def _one(boxes: list[_Box], kind: bytes) -> _Box:
    named = [box for box in boxes if box.kind == kind]
    if len(named) != 1:
        raise ValueError(f"{len(named)} boxes {kind!r}")
    return named[0]


def strip_avif(data: bytes) -> bytes:
    """Copy the boxes that describe the picture, and the payload of its items but metadata.

    Metadata and thumbnail items stay listed, as type `free` without content. The orientation of
    an AVIF lies in properties of the picture (`irot`, `imir`), not in EXIF.
    """
    top = _boxes(data, 0, len(data))
    if not top or top[0].kind != b"ftyp" or any(box.kind == b"moov" for box in top):
        raise ValueError("not a still picture")
    meta = _one(top, b"meta")
    inner = _boxes(data, meta.start + 4, meta.end)
    kept = _Blank(data)
    for box in top:  # heads only, but for these two
        end = box.end if box.kind in (b"ftyp", b"meta") else box.start
        if box.kind in (b"ftyp", b"meta", b"mdat"):
            kept.keep(box.head, end - box.head)
    for box in [*inner, *_properties(data, inner)]:
        if box.kind in _BLANK_BOXES:
            kept.write(box.start, bytes(box.end - box.start))
    dropped = _drop_items(data, inner, kept)
    for item, start, size in _extents(data, inner):
        if item not in dropped:
            kept.keep(start, size)
    kept.end = max(kept.end, max(box.end for box in top if box.kind in (b"meta", b"mdat")))
    return kept.result()


def _properties(data: bytes, inner: list[_Box]) -> list[_Box]:
    containers = _boxes(data, *_one(inner, b"iprp").payload)
    return _boxes(data, *_one(containers, b"ipco").payload)


def _drop_items(data: bytes, inner: list[_Box], kept: _Blank) -> set[int]:
    """Numbers of the items to blank, whose type becomes `free`; all items lose their names."""
    thumbnails = _thumbnails(data, inner)
    table = _one(inner, b"iinf")
    dropped = set()
    for entry in _boxes(data, table.start + (6 if data[table.start] == 0 else 8), table.end):
        version = data[entry.start]
        if entry.kind != b"infe" or version not in (2, 3):
            raise ValueError("old item table")
        layout, kind_at = (">H", entry.start + 8) if version == 2 else (">I", entry.start + 10)
        (number,) = struct.unpack_from(layout, data, entry.start + 4)
        if data[kind_at : kind_at + 4] in _DROPPED_ITEMS or number in thumbnails:
            dropped.add(number)
            kept.write(kind_at, b"free")
        kept.write(kind_at + 4, bytes(entry.end - kind_at - 4))
    return dropped


def _thumbnails(data: bytes, inner: list[_Box]) -> set[int]:
    found = set()
    for table in [box for box in inner if box.kind == b"iref"]:
        layout = ">H" if data[table.start] == 0 else ">I"
        for reference in _boxes(data, table.start + 4, table.end):
            if reference.kind == b"thmb":
                found.add(struct.unpack_from(layout, data, reference.start)[0])
    return found


def _extents(data: bytes, inner: list[_Box]) -> list[tuple[int, int, int]]:
    """(item, offset in the file, size) for every piece of every item."""
    table = _one(inner, b"iloc")
    version, sizes = data[table.start], struct.unpack_from(">H", data, table.start + 4)[0]
    offset_size, length_size, base_size, index_size = (
        sizes >> shift & 15 for shift in (12, 8, 4, 0)
    )
    reader = _Reader(data, table.start + 6)
    wide = 4 if version == 2 else 2
    found = []
    for _ in range(reader.number(wide)):
        item = reader.number(wide)
        method = reader.number(2) & 15 if version else 0
        if reader.number(2) != 0 or method > 1:
            raise ValueError("an item lies in another file or item")
        base = reader.number(base_size) + (_one(inner, b"idat").start if method else 0)
        for _ in range(reader.number(2)):
            if version:
                reader.number(index_size)
            start = base + reader.number(offset_size)
            found.append((item, start, reader.number(length_size)))
    return found


class _Reader:
    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    def number(self, size: int) -> int:
        self.at += size
        if self.at > len(self.data):
            raise ValueError("the item table runs past the end")
        return int.from_bytes(self.data[self.at - size : self.at], "big")
