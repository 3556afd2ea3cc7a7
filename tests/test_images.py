"""open_image: every sample file has its stated outcome, and no bytes make it fail otherwise."""

from __future__ import annotations

import csv
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from sdprep.images import ImageRejected, exif_orientation, open_image
from sdprep.seeding import rng_for

# Pillow talks about broken metadata through warnings; ingest keeps them off the terminal.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

ANIMATED = {"apng_animated.png", "gif_animated.gif", "webp_animated.webp", "tiff_multipage.tif"}
CORRUPT = {
    "broken_data_stream.png": "decode_error",
    "half.jpg": "truncated",
    "html_error_page.jpg": "not_an_image",
    "png_decompression_dos.png": "decode_error",
    "truncated_jpeg.jpg": "truncated",
    "unknown_compression_method.png": "decode_error",
    "zero_bytes.jpg": "empty_file",
}
SALVAGED = {"hopper_bad_exif.jpg": ("bad_exif",)}


def reason(source: bytes | Path, **options) -> str:
    with pytest.raises(ImageRejected) as caught:
        open_image(source, **options)
    assert str(caught.value).startswith(caught.value.reason)
    return caught.value.reason


def pixels(source: bytes | Path, **options) -> np.ndarray:
    opened = open_image(source, **options)
    assert opened.image.mode == "RGB"
    return np.asarray(opened.image).astype(np.int16)


def saved(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def photo(size: tuple[int, int] = (96, 80), mode: str = "RGB") -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    noise = rng_for(7, mode).integers(0, 256, (8, 8, bands), dtype=np.uint8)
    small = Image.fromarray(noise.squeeze() if bands == 1 else noise, mode)
    return small.resize(size, Image.Resampling.NEAREST)


# --- the sample files ---------------------------------------------------------------------------


def test_every_row_of_formats_has_its_stated_outcome(shared_data):
    folder = shared_data("formats")
    rows = list(csv.DictReader((folder / "manifest.csv").open(encoding="utf-8")))
    assert len(rows) == 51
    for row in rows:
        path = folder / row["file"]
        if row["file"] in ANIMATED:
            assert reason(path) == "animated", row
        opened = open_image(path, first_frame=True)
        info = opened.info
        assert (info.width, info.height) == opened.image.size
        assert opened.image.size == (int(row["display_w"]), int(row["display_h"])), row
        assert info.format == row["pil_format"], row
        assert info.mode == row["pil_mode"], row
        assert info.frames == int(row["frames"]), row
        assert info.exif_orientation == int(row["exif_orientation"] or 1), row
        assert info.warnings == ()
        if opened.alpha is not None:
            assert info.has_alpha
            assert opened.alpha.size == opened.image.size


def test_every_corrupt_file_has_its_stated_outcome(shared_data):
    paths = [p for p in shared_data("corrupt").iterdir() if p.suffix not in (".csv", ".md", ".txt")]
    assert len(paths) == 24
    outcomes, noted = {}, {}
    for path in paths:
        try:
            found = open_image(path).info.warnings
        except ImageRejected as error:
            outcomes[path.name] = error.reason
        else:
            noted |= {path.name: found} if found else {}
    assert outcomes == CORRUPT
    assert noted == SALVAGED


def test_all_orientations_look_like_the_reference(shared_data):
    folder = shared_data("formats")
    reference = pixels(folder / "orientation_reference.png")
    paths = sorted(folder.glob("orientation_[1-8].*"))
    assert len(paths) == 10
    for path in paths:
        assert np.abs(pixels(path) - reference).mean() < 4, path.name


def test_profiles_match_the_srgb_reference(shared_data):
    folder = shared_data("formats")
    reference = pixels(folder / "icc_reference_srgb.png")
    paths = sorted(folder.glob("icc_[!r]*.*"))
    assert len(paths) == 6
    for path in paths:
        assert np.abs(pixels(path) - reference).mean() <= 2, path.name
    untagged = np.asarray(Image.open(folder / "icc_prophoto.png").convert("RGB")).astype(np.int16)
    assert np.abs(untagged - reference).mean() > 15  # so the check above can fail


def test_a_cmyk_jpeg_looks_like_its_rgb_twin(shared_data):
    folder = shared_data("formats")
    difference = pixels(folder / "jpeg_cmyk.jpg") - pixels(folder / "jpeg_rgb_q95.jpg")
    assert np.abs(difference).mean() < 3


def test_hidden_colour_under_alpha_does_not_show(shared_data):
    found = pixels(shared_data("formats") / "png_rgba_hidden_magenta.png")
    assert (found[:100] == 255).all()


# --- EXIF ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_agrees_with_pillow(form, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {} if form in ("TIFF", "PNG") else {"quality": 95}
    data = saved(photo((48, 32)), form, exif=exif, **options)
    expected = ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB")
    opened = open_image(data)
    assert opened.image.size == expected.size
    assert (np.asarray(opened.image) == np.asarray(expected)).all()
    assert opened.info.exif_orientation == orientation


def exif_block(order: str, orientation: int) -> bytes:
    mark = b"II" if order == "<" else b"MM"
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    return mark + struct.pack(order + "HIH", 42, 8, 1) + entry + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_blocks_are_read_in_both_byte_orders(order):
    block = exif_block(order, 8)
    assert exif_orientation(block) == (8, True)
    assert exif_orientation(block[:15]) == (None, False)
    assert exif_orientation(b"") == (None, True)
    assert exif_orientation(b"rubbish and more") == (None, False)


@pytest.mark.parametrize("orientation", [0, 9, 60000])
def test_an_impossible_orientation_is_a_warning(orientation):
    opened = open_image(saved(photo(), "JPEG", exif=b"Exif\0\0" + exif_block("<", orientation)))
    assert opened.info.exif_orientation == 1
    assert opened.info.warnings == ("bad_exif",)


def test_exif_blocks_that_point_at_themselves_end():
    entry = struct.pack("<HHII", 0x8769, 4, 1, 8)
    block = b"II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    assert exif_orientation(block) == (None, True)


# --- what is refused ----------------------------------------------------------------------------


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + body


def test_too_many_pixels_is_judged_by_the_header():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason(png_header(100_000, 100_000)) == "too_many_pixels"
        assert reason(png_header(13_378, 13_378)) == "too_many_pixels"  # just above 178,956,970
        assert reason(png_header(2**31 - 1, 2**31 - 1)) == "too_many_pixels"
        # Between Pillow's warning and its error: ours alone decides, without a warning.
        assert reason(png_header(12_000, 12_000)) in ("truncated", "decode_error")
    assert reason(saved(photo((100, 100))), max_pixels=9_999) == "too_many_pixels"
    assert open_image(saved(photo((100, 100))), max_pixels=10_000).info.width == 100


def test_files_that_are_no_images(tmp_path):
    zipped = b"PK\x03\x04" + bytes(100)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n"
    for data in (zipped, script, b"%PDF-1.7", b"<svg></svg>", b"\0", b"RIFF1234WAVE" + bytes(50)):
        assert reason(data) == "not_an_image"
    assert reason(b"") == "empty_file"
    assert reason(tmp_path / "gone.jpg") == "missing_file"
    assert reason(tmp_path) == "not_an_image"
    assert reason(b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(64)) == "needs_plugin:pillow-heif"
    assert reason(b"\xff\x0a" + bytes(64)) == "needs_plugin:pillow-jxl-plugin"


def test_a_fifo_is_refused_without_waiting(tmp_path):
    import os

    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no FIFOs")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert reason(tmp_path / "pipe.jpg") == "not_an_image"


def test_a_photo_with_an_appended_preview_is_no_animation():
    data = saved(photo(), "MPO", save_all=True, append_images=[photo((48, 40))])
    assert getattr(Image.open(BytesIO(data)), "n_frames", 1) == 2
    opened = open_image(data)
    assert (opened.info.format, opened.info.frames) == ("JPEG", 1)


def test_first_frame_takes_the_first():
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "lime", "blue")]
    for form in ("GIF", "PNG", "WEBP", "TIFF"):
        data = saved(frames[0], form, save_all=True, append_images=frames[1:])
        assert reason(data) == "animated", form
        opened = open_image(data, first_frame=True)
        assert opened.info.frames == 3
        assert np.asarray(opened.image)[0, 0, 0] > 240, form


@pytest.mark.parametrize(
    "form", ["JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "PPM", "JPEG2000", "QOI"]
)
def test_a_file_cut_at_any_tenth_is_truncated(form, shared_data):
    image = Image.open(shared_data("formats") / "tiny_64x64.png").convert("RGB").resize((96, 96))
    data = saved(image, form)
    for tenth in range(1, 10):
        assert reason(data[: len(data) * tenth // 10]) == "truncated", (form, tenth)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate", "jpeg"])
def test_a_cut_tiff_is_truncated(compression):
    data = saved(photo((96, 96)), "TIFF", compression=compression)
    for tenth in range(1, 10):
        assert reason(data[: len(data) * tenth // 10]) == "truncated", tenth


@pytest.mark.parametrize("form", ["BMP", "GIF", "ICO", "JPEG", "PNG", "QOI", "TIFF", "WEBP"])
def test_a_cut_header_is_truncated(form):
    data = saved(photo((96, 96)), form)
    for length in (12, 15, 18, 25, 40):
        assert reason(data[:length]) == "truncated", length


def test_no_damage_raises_anything_but_a_rejection(shared_data):
    names = ["jpeg_cmyk.jpg", "orientation_6.png", "webp_lossless_alpha.webp", "gif_animated.gif"]
    names += ["avif_alpha.avif", "tiff_lzw.tif", "bmp.bmp", "jp2.jp2", "ico.ico", "ppm.ppm"]
    names += ["png_palette_trns.png", "icc_p3.jpg", "apng_animated.png", "png_gray16.png"]
    outcomes: dict[str, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            original = (shared_data("formats") / name).read_bytes()
            for trial in range(25):
                rng = rng_for(3, name, trial)
                data = bytearray(original)
                reach = len(data) if trial % 2 else min(len(data), 400)  # headers more often
                for at in rng.integers(0, reach, int(rng.integers(1, 12))):
                    data[at] = int(rng.integers(0, 256))
                try:
                    open_image(bytes(data), first_frame=True, max_pixels=4_000_000)
                    outcome = "opened"
                except ImageRejected as error:
                    outcome = error.reason
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert sum(outcomes.values()) == 25 * len(names)
    assert {"opened", "truncated", "decode_error"} <= outcomes.keys()


def test_random_bytes_behind_every_magic_are_rejected():
    from sdprep.formats import _MAGIC

    heads = [magic for magic, _ in _MAGIC] + [b"RIFF\xff\0\0\0WEBP", b"\0\0\0\x18ftypavif", b"P6 "]
    for number, head in enumerate(heads):
        noise = rng_for(5, number).integers(0, 256, 600, dtype=np.uint8).tobytes()
        assert reason(head + noise, max_pixels=1_000_000)


# --- threads ------------------------------------------------------------------------------------


def test_threads_agree_and_leave_the_globals_alone(shared_data):
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    folder = shared_data("formats")
    names = ["icc_p3.jpg", "icc_adobergb.png", "orientation_6.webp", "png_la.png"] * 6
    alone = {name: np.asarray(open_image(folder / name).image) for name in names[:4]}
    barrier = threading.Barrier(4)

    def work(part: int) -> list[bool]:
        barrier.wait()
        mine = names[part:] + names[:part]
        return [bool((np.asarray(open_image(folder / n).image) == alone[n]).all()) for n in mine]

    with ThreadPoolExecutor(4) as pool:
        results = [same for part in pool.map(work, range(4)) for same in part]
    assert len(results) == 96
    assert all(results)
    after = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    assert before == after


def test_bombs_of_other_formats_are_refused_by_their_headers():
    jpeg = bytearray(saved(photo(), "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 65500, 65500)
    gif = bytearray(saved(photo(), "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    bmp = bytearray(saved(photo(), "BMP"))
    bmp[18:26] = struct.pack("<ii", 100_000, 100_000)
    qoi = bytearray(saved(photo(), "QOI"))
    qoi[4:12] = struct.pack(">II", 2**31, 2**31)
    canvas = (16_383).to_bytes(3, "little") * 2
    webp = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + canvas
    webp += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    webp = b"RIFF" + struct.pack("<I", len(webp)) + webp
    bombs = [bytes(jpeg), bytes(gif), bytes(bmp), bytes(qoi), b"P6 99999 99999 255\n" + bytes(9)]
    assert [reason(bomb) for bomb in bombs] == ["too_many_pixels"] * 5
    assert reason(webp) in ("too_many_pixels", "decode_error")  # the decoder itself may refuse
