"""Make `tools/demo_photos/photos` anew from the DreamBooth photos; see SOURCE.md beside them.

Usage: python tools/make_demo_photos.py FOLDER
FOLDER holds `<subject>/<NN>.jpg` with `.txt` (tags) and `.caption` beside each.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageFilter, ImageOps

TARGET = Path(__file__).resolve().parent / "demo_photos" / "photos"
LONG_SIDE_PX, QUALITY = 512, 88
FIVE_OF = ("cat", "dog", "dog3", "dog6")  # of every other subject there are four
PHONE = "monster_toy/00"  # lies on its side and tells where it was taken
AGAIN = TARGET / "found_again"


def main(source: Path) -> None:
    """Write the small copies, then the files that the demo is meant to notice."""
    shutil.rmtree(TARGET, ignore_errors=True)
    subjects = sorted(path for path in source.iterdir() if path.is_dir())
    for subject in subjects:
        count = 5 if subject.name in FIVE_OF else 4
        for photo in sorted(subject.glob("*.jpg"))[:count]:
            target = TARGET / subject.name / photo.name
            target.parent.mkdir(parents=True, exist_ok=True)
            small = small_copy(photo)
            if f"{subject.name}/{photo.stem}" == PHONE:
                save(small.transpose(Image.Transpose.ROTATE_90), target, exif=phone_exif())
            else:
                save(small, target)
            copy_text(photo, target)
    AGAIN.mkdir()
    again("cat/00", "reencoded", lambda photo: photo, quality=60)
    again("dog/01", "mirrored", ImageOps.mirror)
    again("teapot/02", "smaller", lambda photo: photo.resize((320, 320), Image.Resampling.LANCZOS))
    again("rc_car/01", "blurred", lambda photo: photo.filter(ImageFilter.GaussianBlur(4)))
    copy = AGAIN / "vase_00_copy.jpg"
    shutil.copyfile(TARGET / "vase/00.jpg", copy)
    copy_text(TARGET / "vase/00.jpg", copy)
    whole = (TARGET / "clock/00.jpg").read_bytes()
    (AGAIN / "clock_00_broken.jpg").write_bytes(whole[: len(whole) * 2 // 5])


def small_copy(path: Path) -> Image.Image:
    """The photo with a long side of at most 512 px, without anything else of the file."""
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((LONG_SIDE_PX, LONG_SIDE_PX), Image.Resampling.LANCZOS)
    small.info = {}
    return small


def save(image: Image.Image, target: Path, quality: int = QUALITY, **options: object) -> None:
    """Write a JPEG."""
    image.save(target, "JPEG", quality=quality, optimize=True, **options)


def phone_exif() -> Image.Exif:
    """What a phone writes: orientation, device, time and place; all of it invented."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F], exif[0x0110] = "Example", "Demo Phone"
    exif[0x0132] = "2026:01:02 03:04:05"
    gps = exif.get_ifd(0x8825)
    gps[1], gps[2] = "N", (51.0, 28.0, 40.0)
    gps[3], gps[4] = "W", (0.0, 0.0, 5.0)
    return exif


def again(
    name: str, change: str, edit: Callable[[Image.Image], Image.Image], quality: int = QUALITY
) -> None:
    """Write an altered copy of one of the photos, with its text."""
    photo = TARGET / f"{name}.jpg"
    target = AGAIN / f"{name.replace('/', '_')}_{change}.jpg"
    with Image.open(photo) as image:
        save(edit(image.convert("RGB")), target, quality)
    copy_text(photo, target)


def copy_text(photo: Path, target: Path) -> None:
    """Copy the tags and the caption that lie beside a photo."""
    for suffix in (".txt", ".caption"):
        shutil.copyfile(photo.with_suffix(suffix), target.with_suffix(suffix))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
