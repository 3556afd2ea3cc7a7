"""Pictures of a run on disk: one folder a moment, a sheet of each, a grid over time."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sdprep.errors import UserError
from sdtrain import contact_sheet
from sdtrain.outputs import write_text_whole

PROMPTS_FILE = "prompts.json"
SHEET, GRID = "all.png", "grid.png"
_SLUG_CHARACTERS = 48

Key = tuple[str, int | None]
"""A prompt, and its seed where there are several."""


def save_pictures(
    place: Path,
    prompts: Sequence[str],
    pictures: Sequence[Image.Image],
    title: str,
    seeds: Sequence[int] | None = None,
) -> list[str]:
    """Write pictures, their prompts and one sheet of all; returns the pictures' file names.

    Args:
        place: the folder, made if absent.
        prompts: one a picture.
        pictures: to be written as PNG.
        title: of the sheet.
        seeds: one a picture, where prompts are drawn with several.
    """
    place.mkdir(parents=True, exist_ok=True)
    keys = _keys(prompts, seeds)
    names = [
        f"{at:02d}-{slug(prompt)}{_ending(seed)}.png" for at, (prompt, seed) in enumerate(keys)
    ]
    for name, picture in zip(names, pictures, strict=True):
        picture.save(place / name)
    sheet = contact_sheet.sheet(list(pictures), [_label(key) for key in keys], title)
    sheet.save(place / SHEET)
    entries = [
        {"file": name, "prompt": prompt, **({} if seed is None else {"seed": seed})}
        for name, (prompt, seed) in zip(names, keys, strict=True)
    ]
    text = json.dumps(entries, indent=1, ensure_ascii=False)
    write_text_whole(place / PROMPTS_FILE, text + "\n")
    return names


def _keys(prompts: Sequence[str], seeds: Sequence[int] | None) -> list[Key]:
    if not seeds:
        return [(prompt, None) for prompt in prompts]
    return list(zip(prompts, seeds, strict=True))


def _ending(seed: int | None) -> str:
    return "" if seed is None else f"-seed{seed}"


def _label(key: Key) -> str:
    prompt, seed = key
    words = " ".join(shown(prompt).split())
    return words if seed is None else f"{words}\nseed {seed}"


def draw_grid(folder: Path, until: int | None = None) -> Path | None:
    """Renew `grid.png`: a row for each moment, a column for each prompt and seed.

    Args:
        folder: `samples/` of a run.
        until: leave out later moments, which belong to a course that was given up.

    Returns:
        the picture's path; None if there are no samples yet.
    """
    entries = moments(folder, until)
    if not entries:
        return None
    keys = list(dict.fromkeys(key for each in entries.values() for key in each))
    rows = [
        (f"{each:,}", [entries[each].get(key) for key in keys])
        for each in contact_sheet.spread(list(entries))
    ]
    picture = contact_sheet.grid(rows, [_label(key) for key in keys], "samples seen")
    save_whole(picture, folder / GRID)
    return folder / GRID


def moments(folder: Path, until: int | None = None) -> dict[int, dict[Key, Path]]:
    """Pictures by prompt and seed of every moment, oldest first.

    Args:
        folder: `samples/` of a run.
        until: leave out later moments, which belong to a course that was given up.
    """
    clocks = sorted(int(path.parent.name) for path in folder.glob(f"*/{PROMPTS_FILE}"))
    return {each: _entries(folder / str(each)) for each in clocks if until is None or each <= until}


def save_whole(picture: Image.Image, path: Path) -> None:
    """Write a picture under another name first, so that nobody ever reads half of it."""
    scratch = path.with_name(f".{path.stem}.new{path.suffix}")
    picture.save(scratch)
    scratch.replace(path)


def _entries(place: Path) -> dict[Key, Path]:
    listed = json.loads((place / PROMPTS_FILE).read_text(encoding="utf-8"))
    return {(entry["prompt"], entry.get("seed")): place / entry["file"] for entry in listed}


def named_pictures(place: Path) -> dict[str, list[Path]]:
    """Pictures of one moment by prompt, in the order of the seeds."""
    found: dict[str, list[Path]] = {}
    for (prompt, _), path in _entries(place).items():
        found.setdefault(shown(prompt), []).append(path)
    return found


def slug(prompt: str) -> str:
    """A prompt as a part of a file name."""
    plain = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:_SLUG_CHARACTERS].strip("-")
    return plain or ("prompt" if prompt else "empty-prompt")


def shown(prompt: str) -> str:
    """A prompt as people read it."""
    return prompt or "(empty prompt)"


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one a line; an empty line is the empty prompt.

    Raises:
        UserError: the file cannot be read or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts {path}: {error}") from None
    if not text:
        raise UserError(
            f"{path} is empty", "Write one prompt a line; an empty line is the empty prompt."
        )
    # str.splitlines would also split at separators that prompts may hold, such as U+2028.
    return [prompt.strip() for prompt in text.removesuffix("\n").split("\n")]
