"""Metadata removal: not a pixel changes, and nothing private is left in the bytes."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps, ImageSequence, PngImagePlugin, features

from sdprep.errors import DataError
from sdprep.exif import minimal_exif
from sdprep.images import open_image
from sdprep.strip import image_extension, strip_metadata

SECRET = b"SECRET-52.3702N-4.8952E"
MARK = SECRET.decode()
needs_avif = pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")


def photo(size: tuple[int, int] = (40, 24), mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (size[1] // 4, size[0] // 4, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)


def private_exif(orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = MARK
    exif[0x013B] = MARK
    exif.get_ifd(0x8825)[1] = "N"
    exif.get_ifd(0x8825)[2] = (52.0, 22.0, 12.7)
    exif.get_ifd(0x8825)[29] = MARK
    exif.get_ifd(0x8769)[0x9286] = SECRET
    return exif.tobytes()


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def chunk(kind: bytes, payload: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + payload))
    return struct.pack(">I", len(payload)) + kind + payload + crc


def stored(data: bytes) -> tuple[list[np.ndarray], str]:
    """Every frame as stored, before orientation and colour."""
    with Image.open(io.BytesIO(data)) as image:
        mode = image.mode
        return [np.asarray(frame.copy()) for frame in ImageSequence.Iterator(image)], mode


def assert_same_picture(before: bytes, after: bytes) -> None:
    frames, mode = stored(before)
    frames_after, mode_after = stored(after)
    assert mode_after == mode
    assert len(frames_after) == len(frames)
    for one, other in zip(frames, frames_after, strict=True):
        np.testing.assert_array_equal(one, other)
    with Image.open(io.BytesIO(before)) as one, Image.open(io.BytesIO(after)) as other:
        assert one.info.get("icc_profile") == other.info.get("icc_profile")
        assert one.info.get("transparency") == other.info.get("transparency")
        upright, upright_after = ImageOps.exif_transpose(one), ImageOps.exif_transpose(other)
        np.testing.assert_array_equal(np.asarray(upright), np.asarray(upright_after))


def with_private_segments(data: bytes) -> bytes:
    """A JPEG with every kind of metadata there is, fill bytes and a motion-photo trailer."""
    thumbnail = saved(photo((16, 16)), "JPEG")
    jfif_end = 2 + 2 + struct.unpack_from(">H", data, 4)[0]
    assert data[6:10] == b"JFIF"
    return (
        data[:jfif_end]
        + segment(0xE0, b"JFXX\0\x10" + thumbnail + SECRET)
        + b"\xff\xff\xff"  # fill bytes before a marker
        + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x>" + SECRET + b"</x>")
        + segment(0xE2, b"MPF\0" + SECRET)
        + segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04" + SECRET)
        + segment(0xEB, SECRET)
        + segment(0xFE, SECRET)
        + data[jfif_end:]
        + b"\0\0\0\x18ftypmp42"
        + SECRET
        + thumbnail
    )


JPEGS = {
    "baseline": {"quality": 90},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 1, "quality": 95},
    "444": {"subsampling": 0},
    "optimised": {"optimize": True},
}


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS.keys())
@pytest.mark.parametrize("orientation", [1, 6])
def test_jpeg_loses_every_private_segment(options: dict, orientation: int) -> None:
    profile = srgb_profile() * 60  # several APP2 segments
    data = saved(
        photo(),
        "JPEG",
        exif=private_exif(orientation),
        icc_profile=profile,
        comment=MARK,
        **options,
    )
    data = with_private_segments(data)
    stripped = strip_metadata(data, "JPEG")
    assert data.count(SECRET) >= 8
    assert SECRET not in stripped
    assert b"JFXX" not in stripped
    assert stripped.endswith(b"\xff\xd9")
    assert (b"Exif" in stripped) == (orientation != 1)
    assert_same_picture(data, stripped)
    with Image.open(io.BytesIO(stripped)) as image:
        exif = image.getexif()
        assert dict(exif) == ({0x0112: orientation} if orientation != 1 else {})
        assert not exif.get_ifd(0x8825)


def test_jpeg_orientation_written_in_xmp_alone_survives() -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    stripped = strip_metadata(saved(photo(), "JPEG", xmp=xmp), "JPEG")
    assert b"xmpmeta" not in stripped
    with Image.open(io.BytesIO(stripped)) as image:
        assert image.getexif()[0x0112] == 8


def test_thumbnail_within_jfif_goes() -> None:
    data = saved(photo(), "JPEG")
    assert data[4:6] == b"\0\x10"
    thumbnail = b"\0SECRET-pixel" * 3  # 3 x 4 pixels of RGB
    head = segment(0xE0, data[6:18] + b"\x03\x04" + thumbnail[:36])
    stripped = strip_metadata(data[:2] + head + data[20:], "JPEG")
    assert stripped == data


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_jpeg_modes_keep_their_colour_flag(mode: str) -> None:
    data = saved(photo(mode=mode), "JPEG", comment=MARK)
    stripped = strip_metadata(data, "JPEG")
    assert (b"Adobe" in stripped) == (mode == "CMYK")
    assert_same_picture(data, stripped)


def test_second_picture_of_an_mpo_goes() -> None:
    data = saved(photo(), "MPO", save_all=True, append_images=[photo((80, 80))])
    stripped = strip_metadata(data, "MPO")
    assert stripped.count(b"\xff\xd8\xff") == 1
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(stripped)) as after:
        assert after.format == "JPEG"
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "I;16"])
def test_png_loses_text_and_time(mode: str) -> None:
    image = photo(mode="L").convert("I;16") if mode == "I;16" else photo(mode=mode)
    notes = PngImagePlugin.PngInfo()
    notes.add_text("parameters", MARK)
    notes.add_text("Comment", MARK, zip=True)
    notes.add_itxt("XML:com.adobe.xmp", MARK)
    notes.add(b"tIME", b"\x07\xe9\1\2\3\4\5")
    notes.add(b"prVt", SECRET)
    profile = srgb_profile() if mode in ("RGB", "RGBA") else None
    data = saved(image, "PNG", pnginfo=notes, exif=private_exif(5), icc_profile=profile)
    data += SECRET
    stripped = strip_metadata(data, "PNG")
    for word in (SECRET, b"tEXt", b"zTXt", b"iTXt", b"tIME", b"prVt"):
        assert word in data
        assert word not in stripped
    assert_same_picture(data, stripped)
    with Image.open(io.BytesIO(stripped)) as image:
        assert dict(image.getexif()) == {0x0112: 5}


def test_name_of_a_png_profile_goes_and_the_profile_stays() -> None:
    plain = saved(photo(), "PNG")
    profile = chunk(b"iCCP", SECRET + b"\0\0" + zlib.compress(srgb_profile()))
    data = plain[:33] + profile + plain[33:]
    stripped = strip_metadata(data, "PNG")
    assert SECRET not in stripped
    assert_same_picture(data, stripped)


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("orientation", [1, 3])
def test_webp_loses_exif_and_xmp(lossless: bool, mode: str, orientation: int) -> None:
    image = photo((41, 23), mode)
    if mode == "RGBA":
        image.putalpha(photo((41, 23), "L"))
    options = {"lossless": lossless, "icc_profile": srgb_profile(), "xmp": SECRET}
    data = saved(image, "WEBP", exif=private_exif(orientation), **options) + SECRET
    stripped = strip_metadata(data, "WEBP")
    assert SECRET not in stripped
    assert b"XMP " not in stripped
    assert struct.unpack_from("<I", stripped, 4)[0] == len(stripped) - 8
    assert stripped[12:16] == b"VP8X"
    assert stripped[20] & 0x0C == (0x08 if orientation == 3 else 0)  # EXIF, XMP
    assert_same_picture(data, stripped)
    with Image.open(io.BytesIO(stripped)) as opened:
        assert dict(opened.getexif()) == ({0x0112: 3} if orientation == 3 else {})


def test_gif_loses_comments_and_foreign_applications() -> None:
    frames = [photo(mode="P"), photo().rotate(90).convert("P")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:], comment=SECRET, loop=3)
    colours = 3 << (data[10] & 7) + 1
    xmp = b"\x21\xff\x0bXMP DataXMP" + bytes([len(SECRET)]) + SECRET + b"\0"
    data = data[: 13 + colours] + xmp + data[13 + colours :] + SECRET
    stripped = strip_metadata(data, "GIF")
    assert SECRET not in stripped
    assert_same_picture(data, stripped)
    with Image.open(io.BytesIO(stripped)) as image:
        assert image.info["loop"] == 3


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "jpeg", "tiff_adobe_deflate"])
@pytest.mark.parametrize("big", [False, True])
def test_tiff_loses_every_tag_but_those_of_the_picture(compression: str | None, big: bool) -> None:
    options: dict = {"compression": compression} if compression else {}
    tags = {270: MARK, 305: MARK, 315: MARK, 33723: SECRET, 700: SECRET, 0x0112: 6}
    data = saved(
        photo(), "TIFF", tiffinfo=tags, icc_profile=srgb_profile(), big_tiff=big, **options
    )
    data += SECRET
    stripped = strip_metadata(data, "TIFF")
    assert data.count(SECRET) >= 5
    assert SECRET not in stripped
    assert image_extension(stripped) == "tif"
    assert_same_picture(data, stripped)
    with Image.open(io.BytesIO(stripped)) as image:
        assert image.getexif()[0x0112] == 6


def test_tiff_with_gps_and_several_pages() -> None:
    data = saved(
        photo(),
        "TIFF",
        exif=private_exif(6),
        save_all=True,
        append_images=[photo((12, 16), "L"), photo((8, 8), "CMYK")],
    )
    stripped = strip_metadata(data, "TIFF")
    assert SECRET in data
    assert SECRET not in stripped
    assert len(stored(stripped)[0]) == 3
    assert_same_picture(data, stripped)


@needs_avif
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_avif_loses_exif_and_xmp(orientation: int, mode: str) -> None:
    image = photo(mode=mode)
    data = saved(
        image, "AVIF", exif=private_exif(orientation), xmp=SECRET, icc_profile=srgb_profile()
    )
    data += b"\0\0\0\x30uuid" + SECRET.ljust(40, b".")
    stripped = strip_metadata(data, "AVIF")
    assert data.count(SECRET) >= 4
    assert SECRET not in stripped
    assert image_extension(stripped) == "avif"
    assert_same_picture(data, stripped)
    with Image.open(io.BytesIO(stripped)) as opened:
        assert set(opened.getexif()) <= {0x0112}
        assert "xmp" not in opened.info


def test_jpeg_2000_loses_boxes_and_comments() -> None:
    plain = saved(photo(), "JPEG2000", comment=SECRET, plt=True)
    data = plain[:12] + plain[12:]
    data += struct.pack(">I", len(SECRET) + 8) + b"xml " + SECRET
    stripped = strip_metadata(data, "JPEG2000")
    assert data.count(SECRET) == 2
    assert SECRET not in stripped
    assert image_extension(stripped) == "jp2"
    assert_same_picture(data, stripped)
    raw = saved(photo(), "JPEG2000", comment=SECRET, no_jp2=True)
    assert SECRET not in strip_metadata(raw, "JPEG2000")
    assert_same_picture(raw, strip_metadata(raw, "JPEG2000"))


@pytest.mark.parametrize(
    ("format", "mode", "extension"),
    [
        ("BMP", "RGB", "bmp"),
        ("BMP", "P", "bmp"),
        ("PPM", "RGB", "png"),
        ("TGA", "RGBA", "png"),
        ("PCX", "L", "png"),
        ("ICO", "RGBA", "png"),
    ],
)
def test_other_formats_keep_their_pixels(format: str, mode: str, extension: str) -> None:
    data = saved(photo((32, 32), mode), format) + SECRET
    stripped = strip_metadata(data, format)
    assert SECRET not in stripped
    assert image_extension(stripped) == extension
    np.testing.assert_array_equal(stored(data)[0][0], stored(stripped)[0][0])


def test_tiff_that_cannot_be_cut_is_packed_upright() -> None:
    data = saved(photo(), "TIFF", tiffinfo={270: MARK, 0x0112: 6})
    counts = struct.pack("<HHI", 279, 4, 1)
    assert data.count(counts) == 1
    data = data.replace(counts, struct.pack("<HHI", 65000, 4, 1))  # no strip byte counts
    stripped = strip_metadata(data, "TIFF")
    assert image_extension(stripped) == "png"
    assert SECRET not in stripped
    np.testing.assert_array_equal(pixels_of(open_image(data)), pixels_of(open_image(stripped)))


def test_pixels_that_png_cannot_hold_are_refused_with_the_reason() -> None:
    data = saved(photo(mode="L").convert("F"), "TIFF")[:4] + b"\xff" * 4  # no directory
    with pytest.raises(DataError, match="TIFF file cannot be removed"):
        strip_metadata(data, "TIFF")


def test_every_shared_format_looks_as_before(shared_data) -> None:
    folder, checked = shared_data("formats"), 0
    import csv

    for row in csv.DictReader((folder / "manifest.csv").open(encoding="utf-8")):
        data = (folder / row["file"]).read_bytes()
        stripped = strip_metadata(data, row["pil_format"])
        before, after = open_image(data, first_frame=True), open_image(stripped, first_frame=True)
        np.testing.assert_array_equal(pixels_of(before), pixels_of(after), err_msg=row["file"])
        if image_extension(stripped) != "png":
            assert_same_picture(data, stripped)
        else:
            assert row["pil_format"] in ("PNG", "PPM", "ICO")
        assert strip_metadata(stripped, Image.open(io.BytesIO(stripped)).format) == stripped
        checked += 1
    assert checked > 40


def pixels_of(opened: object) -> np.ndarray:
    return np.asarray(getattr(opened, "image", opened))


def test_damaged_metadata_do_not_turn_the_picture(shared_data) -> None:
    checked = 0
    for path in sorted(shared_data("corrupt").iterdir()):
        try:
            before = open_image(path, first_frame=True)
        except DataError:
            continue
        info = before.info
        stripped = strip_metadata(path.read_bytes(), info.format, orientation=info.exif_orientation)
        np.testing.assert_array_equal(
            pixels_of(before), pixels_of(open_image(stripped)), err_msg=path.name
        )
        checked += 1
    assert checked >= 8


def every_format() -> dict[str, bytes]:
    made = {
        "JPEG": with_private_segments(saved(photo(), "JPEG", exif=private_exif(6))),
        "PNG": saved(photo(), "PNG", exif=private_exif(6)),
        "WEBP": saved(photo(), "WEBP", exif=private_exif(6)),
        "GIF": saved(photo(mode="P"), "GIF", comment=SECRET),
        "TIFF": saved(photo(), "TIFF", exif=private_exif(6)),
        "JPEG2000": saved(photo(), "JPEG2000"),
        "BMP": saved(photo(), "BMP"),
        "PPM": saved(photo(), "PPM"),
    }
    if features.check("avif"):
        made["AVIF"] = saved(photo(), "AVIF", exif=private_exif(6), xmp=SECRET)
    return made


MADE = every_format()


def assert_answer_or_data_error(data: bytes, format: str) -> None:
    """Any other exception ends the test."""
    problem = None
    try:
        answer = strip_metadata(data, format)
    except DataError as error:
        problem, answer = error, b""
    assert isinstance(answer, bytes)
    assert problem is None or format in problem.message


@settings(max_examples=60, deadline=5000)
@given(st.data())
def test_damaged_files_end_in_an_answer_or_a_data_error(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(sorted(MADE)))
    whole = MADE[format]
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    assert_answer_or_data_error(bytes(damaged), format)


def test_every_truncation_of_a_header_is_survived() -> None:
    for format, whole in MADE.items():
        for end in range(0, min(len(whole), 400), 3):
            assert_answer_or_data_error(whole[:end], format)


def test_a_truncated_jpeg_is_not_made_to_look_whole() -> None:
    data = saved(photo((64, 64)), "JPEG", quality=95)
    stripped = strip_metadata(data[:-200], "JPEG")
    with Image.open(io.BytesIO(stripped)) as image, pytest.raises(OSError, match="truncated"):
        image.load()


def test_minimal_exif_is_read_back() -> None:
    exif = Image.Exif()
    exif.load(minimal_exif(7))
    assert dict(exif) == {0x0112: 7}
