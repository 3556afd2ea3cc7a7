"""Depth, profiles and alpha: what open_image makes of every kind of pixels."""

from __future__ import annotations

import struct
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms

from sdprep.colour import _transform
from sdprep.images import open_image
from sdprep.seeding import rng_for


def saved(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def photo(size: tuple[int, int] = (96, 80), mode: str = "RGB") -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    noise = rng_for(7, mode).integers(0, 256, (8, 8, bands), dtype=np.uint8)
    small = Image.fromarray(noise.squeeze() if bands == 1 else noise, mode)
    return small.resize(size, Image.Resampling.NEAREST)


def test_sixteen_bit_grey_is_divided_by_257_and_never_clipped():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values / 257).astype(np.int16)
    for data in (
        saved(Image.fromarray(values)),
        saved(Image.fromarray(values), "TIFF"),
        saved(Image.frombytes("I;16B", (256, 256), values.astype(">u2").tobytes()), "TIFF"),
        saved(Image.fromarray(values.astype(np.int32)), "TIFF"),
        b"P5 256 256 65535\n" + values.astype(">u2").tobytes(),
    ):
        opened = open_image(data)
        assert opened.info.mode.startswith("I")
        assert opened.info.warnings == ()
        for band in opened.image.split():
            assert (np.asarray(band) == expected).all()


def test_sixteen_bit_transparent_grey_has_alpha():
    values = np.full((80, 80), 30000, dtype=np.uint16)
    values[:40] = 100
    opened = open_image(saved(Image.fromarray(values), transparency=100))
    assert np.asarray(opened.alpha)[:40].max() == 0
    assert (np.asarray(opened.image)[:40] == 255).all()
    assert (np.asarray(opened.image)[40:] == round(30000 / 257)).all()


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_float_pixels_are_not_clipped(scale):
    ramp = np.linspace(0, scale, 80 * 80, dtype=np.float32).reshape(80, 80)
    opened = open_image(saved(Image.fromarray(ramp), "TIFF"))
    found = np.asarray(opened.image)[..., 0]
    assert np.abs(found - np.rint(ramp / scale * 255)).max() <= 1
    assert opened.info.warnings == (("depth_stretched",) if scale > 1 else ())


def test_wide_integers_and_nan_are_stretched_with_a_warning():
    wide = np.linspace(-5, 2**30, 6400).astype(np.int32).reshape(80, 80)
    ramp = np.linspace(0, 9, 6400, dtype=np.float32).reshape(80, 80)
    ramp[0, 0] = np.nan
    for values in (wide, ramp):
        opened = open_image(saved(Image.fromarray(values), "TIFF"))
        assert opened.info.warnings == ("depth_stretched",)
        assert np.asarray(opened.image)[-1, -1, 0] == 255


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB"])
def test_modes_without_alpha_become_rgb(mode):
    source = photo().convert("RGB")
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(source, srgb, lab, outputMode="LAB")
    else:
        image = source.convert(mode)
    opened = open_image(saved(image, "TIFF"))
    assert opened.alpha is None
    assert not opened.info.has_alpha
    if mode in ("RGB", "CMYK", "YCbCr", "LAB"):
        assert np.abs(np.asarray(opened.image).astype(int) - np.asarray(source)).mean() < 3


def test_every_kind_of_alpha_is_composited_on_the_background():
    rgba = photo((64, 64)).convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize((64, 64)))
    palette = photo((64, 64)).convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    cases = {
        "RGBA": (saved(rgba), rgba),
        "LA": (saved(rgba.convert("LA")), rgba.convert("LA").convert("RGBA")),
        "P": (saved(palette, transparency=0), None),
        "P bytes": (saved(palette, transparency=bytes(range(0, 256, 32))), None),
        "L": (saved(photo((64, 64), "L"), transparency=int(photo((64, 64), "L").getpixel((0, 0)))),
              None),
        "RGB": (saved(photo((64, 64)), transparency=photo((64, 64)).getpixel((0, 0))), None),
        "webp": (saved(rgba, "WEBP", lossless=True, exact=True), rgba),
    }  # fmt: skip
    for name, (data, same) in cases.items():
        same = same or Image.open(BytesIO(data)).convert("RGBA")
        for colour in ((255, 255, 255), (10, 200, 30)):
            opened = open_image(data, background=colour)
            alpha = np.asarray(same)[..., 3:] / 255
            expected = np.asarray(same)[..., :3] * alpha + np.array(colour) * (1 - alpha)
            assert np.abs(np.asarray(opened.image) - expected).max() <= 1.01, name
            assert (np.asarray(opened.alpha) == np.asarray(same)[..., 3]).all(), name
            assert opened.info.has_alpha


def test_opaque_alpha_is_recorded_but_not_returned():
    opened = open_image(saved(photo().convert("RGBA")))
    assert opened.info.has_alpha
    assert opened.alpha is None


def test_alpha_is_turned_with_the_image():
    image = Image.new("RGBA", (60, 90), (255, 0, 0, 255))
    image.paste((0, 0, 255, 0), (0, 0, 60, 30))  # transparent at the stored top
    exif = Image.Exif()
    exif[0x0112] = 6  # its right-hand side is the upright top
    for data in (
        saved(image, exif=exif),
        saved(image.convert("P"), exif=exif, transparency=image.convert("P").getpixel((0, 0))),
    ):
        opened = open_image(data)
        assert opened.image.size == (90, 60)
        assert np.asarray(opened.alpha)[:, 60:].max() == 0
        assert np.asarray(opened.alpha)[:, :60].min() == 255


def test_an_srgb_profile_leaves_pixels_alone():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = photo()
    assert _transform(profile, "RGB") is None  # exactly, and without the cost
    opened = open_image(saved(image, icc_profile=profile))
    assert (np.asarray(opened.image) == np.asarray(image)).all()
    assert opened.info.warnings == ()


def test_a_profile_applies_to_grey_and_palette_pixels(shared_data):
    wide = Image.open(shared_data("formats") / "icc_prophoto.png").info["icc_profile"]
    grey = photo(mode="L")
    for image in (grey, grey.convert("P"), grey.convert("LA")):
        opened = open_image(saved(image, icc_profile=wide))
        assert opened.info.warnings == ()
        tagged = open_image(saved(grey.convert("RGB"), icc_profile=wide))
        assert np.abs(np.asarray(opened.image).astype(int) - np.asarray(tagged.image)).max() <= 1
        assert np.abs(np.asarray(opened.image).astype(int) - np.asarray(grey)[..., None]).max() > 3


def cmyk_profile() -> bytes:
    """A minimal CMYK profile: any ink gives mid grey, no ink the white of the paper."""
    matrix = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    ramp = bytes(range(256))
    grid = b"".join(bytes((255, 128, 128)) if i == 0 else bytes((128, 128, 128)) for i in range(16))
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + matrix + ramp * 4 + grid + ramp * 3
    table += bytes(-len(table) % 4)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    text = b"text" + bytes(4) + b"public domain\0\0\0"
    tags = [(b"A2B0", table), (b"A2B1", table), (b"wtpt", white), (b"cprt", text), (b"desc", text)]
    at, index, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, value in tags:
        index += name + struct.pack(">II", at + len(body), len(value))
        body += value
    size = at + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02100000, b"prtr", b"CMYK", b"Lab ")
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    header += struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + index + body


def test_cmyk_goes_through_its_profile():
    image = Image.new("CMYK", (80, 80), (255, 0, 0, 0))
    image.paste((0, 0, 0, 0), (0, 0, 80, 40))
    found = np.asarray(open_image(saved(image, "TIFF", icc_profile=cmyk_profile())).image)
    assert found[10, 10].min() >= 250
    assert np.ptp(found[60, 40].astype(int)) <= 3  # neutral, where plain arithmetic gives cyan
    plain = np.asarray(open_image(saved(image, "TIFF")).image)
    assert plain[60, 40].tolist() == [0, 255, 255]


@pytest.mark.parametrize("case", ["garbage", "wrong kind", "cut"])
def test_a_bad_profile_is_a_warning(case, shared_data):
    wide = Image.open(shared_data("formats") / "icc_p3.png").info["icc_profile"]
    profile = {"garbage": b"no profile", "wrong kind": cmyk_profile(), "cut": wide[:100]}[case]
    opened = open_image(saved(photo(), icc_profile=profile))
    assert opened.info.warnings == ("bad_icc",)
    assert (np.asarray(opened.image) == np.asarray(photo())).all()
