"""Metadata removal for formats made of segments, each with its length: JPEG, PNG, WebP and others.

Every function takes a whole file and returns one with fewer segments. A ValueError, IndexError or
struct.error means a layout that cannot be cut safely.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

from sdprep.exif import minimal_exif, orientation_of


def _orientation(data: bytes, known: int | None, may_turn: bool) -> int:
    """What to write: 1 where no segment can turn the picture, else what is known or found."""
    if not may_turn:
        return 1
    return orientation_of(data) if known is None else known


# --- JPEG ---------------------------------------------------------------------------------------

_MARKER = re.compile(rb"\xff+[^\x00\xff]")
_MARKER_IN_SCAN = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")  # restarts belong to the scan
_SOI, _EOI, _SOS, _APP0, _APP1, _APP2, _APP14 = 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xE2, 0xEE
_NO_LENGTH = {0x01, *range(0xD0, 0xD9)}
_JPEG_KEPT = {*range(0xC0, 0xD0)} - {0xC8} | {_SOS, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF}
"""Frames, Huffman and arithmetic tables, scans, quantisation, line count, restart interval."""


def strip_jpeg(data: bytes, orientation: int | None = None) -> bytes:
    """Keep frames, tables, scans, JFIF without thumbnail, ICC profile and Adobe colour flag."""
    if data[:2] != b"\xff\xd8":
        raise ValueError("no SOI")
    parts: list[bytes] = []
    may_turn, end = False, b""  # a missing EOI stays missing: it would hide a truncation
    for marker, payload, scan in _jpeg_segments(data):
        may_turn |= marker == _APP1
        if marker == _EOI:
            end = b"\xff\xd9"
        kept = _jpeg_kept(marker, payload)
        if kept is not None:
            parts += [struct.pack(">BBH", 0xFF, marker, len(kept) + 2), kept, scan]
    orientation = _orientation(data, orientation, may_turn)
    if orientation != 1:
        exif = b"Exif\0\0" + minimal_exif(orientation)
        after_jfif = 3 if parts and parts[1].startswith(b"JFIF") else 0
        parts.insert(after_jfif, struct.pack(">BBH", 0xFF, _APP1, len(exif) + 2) + exif)
    return b"".join([b"\xff\xd8", *parts, end])


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Marker, payload and (after SOS) the entropy-coded data, up to the first EOI."""
    position = 2
    while found := _MARKER.search(data, position):
        marker, start = data[found.end() - 1], found.end()
        if marker == _EOI:
            yield marker, b"", b""
            return
        if marker in _NO_LENGTH:
            position = start
            continue
        (length,) = struct.unpack_from(">H", data, start)
        position = start + length
        if length < 2 or position > len(data):
            raise ValueError(f"segment {marker:02x} runs past the end")
        scan = b""
        if marker == _SOS:
            following = _MARKER_IN_SCAN.search(data, position)
            end = following.start() if following else len(data)
            scan, position = data[position:end], end
        yield marker, data[start + 2 : start + length], scan


def _jpeg_kept(marker: int, payload: bytes) -> bytes | None:
    if marker in _JPEG_KEPT:
        return payload
    if marker == _APP0 and payload.startswith(b"JFIF\0") and len(payload) >= 14:
        return payload[:12] + b"\0\0"  # its thumbnail goes
    if marker == _APP2 and payload.startswith(b"ICC_PROFILE\0"):
        return payload
    if marker == _APP14 and payload.startswith(b"Adobe") and len(payload) >= 12:
        return payload[:12]  # says how CMYK, YCCK and RGB are coded
    return None


# --- PNG ----------------------------------------------------------------------------------------

_PNG_KEPT = set(b"IHDR PLTE tRNS IDAT cHRM gAMA iCCP sBIT sRGB cICP mDCV cLLI".split())
_PNG_KEPT |= {b"acTL", b"fcTL", b"fdAT"}
_PNG_MAY_TURN = {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}  # also old EXIF profiles and XMP in text


def strip_png(data: bytes, orientation: int | None = None) -> bytes:
    """Keep pixels, palette, transparency, animation and everything about colour."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError("no PNG signature")
    parts = [data[:8]]
    position, may_turn = 8, False
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IEND":
            break
        end = position + 12 + length
        if end > len(data):
            raise ValueError("chunk runs past the end")
        may_turn |= kind in _PNG_MAY_TURN
        if kind == b"iCCP":
            profile = data[position + 8 : end - 4]
            parts.append(_png_chunk(kind, b"icc" + profile[profile.index(b"\0") :]))
        elif kind in _PNG_KEPT:
            parts.append(data[position:end])
        position = end
    if len(parts) < 2 or parts[1][4:8] != b"IHDR":
        raise ValueError("IHDR is not first")
    orientation = _orientation(data, orientation, may_turn)
    if orientation != 1:
        parts.insert(2, _png_chunk(b"eXIf", minimal_exif(orientation)))
    return b"".join([*parts, _png_chunk(b"IEND", b"")])


def _png_chunk(kind: bytes, payload: bytes) -> bytes:
    checksum = zlib.crc32(kind + payload)
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", checksum)


# --- WebP ---------------------------------------------------------------------------------------

_WEBP_PIXELS = {b"VP8 ", b"VP8L", b"ALPH"}
_WEBP_EXIF, _WEBP_XMP = 0x08, 0x04  # flags of VP8X


def strip_webp(data: bytes, orientation: int | None = None) -> bytes:
    """Keep pixels, alpha, animation and ICC profile; mend the flags of VP8X and the RIFF size."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        raise ValueError("no RIFF WEBP header")
    end = min(len(data), 8 + struct.unpack_from("<I", data, 4)[0])
    chunks = list(_riff_chunks(data, 12, end))
    may_turn = any(kind in (b"EXIF", b"XMP ") for kind, _ in chunks)
    orientation = _orientation(data, orientation, may_turn)
    parts, is_extended = [], False
    for kind, payload in chunks:
        if kind == b"VP8X":
            is_extended = True
            flags = payload[0] & ~(_WEBP_EXIF | _WEBP_XMP) | (orientation != 1) * _WEBP_EXIF
            parts.append(_riff_chunk(kind, bytes([flags]) + payload[1:]))
        elif kind == b"ANMF":
            inner = _riff_chunks(payload, 16, len(payload))
            frame = [_riff_chunk(*chunk) for chunk in inner if chunk[0] in _WEBP_PIXELS]
            parts.append(_riff_chunk(kind, payload[:16] + b"".join(frame)))
        elif kind in _WEBP_PIXELS or kind in (b"ICCP", b"ANIM"):
            parts.append(_riff_chunk(kind, payload))
    if orientation != 1:
        if not is_extended:
            raise ValueError("EXIF without VP8X")
        parts.append(_riff_chunk(b"EXIF", minimal_exif(orientation)))
    return _riff_chunk(b"RIFF", b"WEBP" + b"".join(parts))


def _riff_chunks(data: bytes, position: int, end: int) -> Iterator[tuple[bytes, bytes]]:
    while position + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, position)
        if position + 8 + length > end:
            raise ValueError("chunk runs past the end")
        yield kind, data[position + 8 : position + 8 + length]
        position += 8 + length + length % 2


def _riff_chunk(kind: bytes, payload: bytes) -> bytes:
    return kind + struct.pack("<I", len(payload)) + payload + b"\0" * (len(payload) % 2)


# --- GIF ----------------------------------------------------------------------------------------

_GIF_APPLICATIONS = (b"NETSCAPE2.0", b"ANIMEXTS1.0", b"ICCRGBG1012")  # loops, colour profile


def strip_gif(data: bytes) -> bytes:
    """Keep frames, their controls, loop count and colour profile."""
    if data[:4] != b"GIF8":
        raise ValueError("no GIF header")
    position = 13 + _gif_colours(data[10])
    parts = [data[:position]]
    while position < len(data) and data[position] != 0x3B:
        start, kind = position, data[position]
        if kind == 0x2C:
            position += 10 + _gif_colours(data[position + 9]) + 1
        elif kind == 0x21:
            position += 2
        else:  # decoders skip stray bytes
            position += 1
            continue
        first = data[position + 1 : position + 12]
        position = _gif_blocks_end(data, position)
        is_control = kind == 0x21 and data[start + 1] == 0xF9
        is_application = kind == 0x21 and data[start + 1] == 0xFF and first in _GIF_APPLICATIONS
        if kind == 0x2C or is_control or is_application:
            parts.append(data[start:position])
    return b"".join([*parts, b";"])


def _gif_colours(flags: int) -> int:
    """Bytes of the colour table that `flags` announces."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _gif_blocks_end(data: bytes, position: int) -> int:
    while data[position]:
        position += 1 + data[position]
    return position + 1


# --- BMP, JPEG 2000 -----------------------------------------------------------------------------


def strip_bmp(data: bytes) -> bytes:
    """Cut after the pixels; only the plain layout, without a profile or a gap before them."""
    start, size, width, height = struct.unpack_from("<IIii", data, 10)
    bits, compression = struct.unpack_from("<HI", data, 28)
    (num_colours,) = struct.unpack_from("<I", data, 46)
    palette = 4 * (num_colours or 1 << bits) if bits <= 8 else 0
    if data[:2] != b"BM" or size != 40 or compression != 0 or start != 54 + palette:
        raise ValueError("not a plain BMP")
    end = start + (width * bits + 31) // 32 * 4 * abs(height)
    if end > len(data) or width <= 0:
        raise ValueError("pixels run past the end")
    header = data[:2] + struct.pack("<I", end) + b"\0\0\0\0" + data[10:54]
    return header + data[54:end]


def strip_jpeg2000(data: bytes) -> bytes:
    """Keep header and codestream of a JP2 file, or a bare codestream, without its comments."""
    if data[:4] == b"\xff\x4f\xff\x51":
        return _strip_codestream(data)
    parts, position = [], 0
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        head = 8
        if length == 1:
            (length,), head = struct.unpack_from(">Q", data, position + 8), 16
        end = len(data) if length == 0 else position + length
        if end > len(data) or end < position + head:
            raise ValueError("box runs past the end")
        payload = data[position + head : end]
        if kind == b"jp2c":
            payload = _strip_codestream(payload)
        if kind in (b"jP  ", b"ftyp", b"jp2h", b"jp2c"):
            parts.append(struct.pack(">I4s", len(payload) + 8, kind) + payload)
        position = end
    if not any(part[4:8] == b"jp2c" for part in parts):
        raise ValueError("no codestream")
    return b"".join(parts)


def _strip_codestream(data: bytes) -> bytes:
    """Without comment markers (FF64) in the main header; tile parts as they are, up to EOC."""
    parts, position = [data[:2]], 2
    while data[position : position + 2] != b"\xff\x90":  # start of the first tile part
        marker, length = struct.unpack_from(">HH", data, position)
        if marker < 0xFF4F or length < 2:
            raise ValueError("no marker in the main header")
        if marker != 0xFF64:
            parts.append(data[position : position + 2 + length])
        position += 2 + length
    end = data.rfind(b"\xff\xd9")
    return b"".join([*parts, data[position : end + 2 if end > position else len(data)]])
