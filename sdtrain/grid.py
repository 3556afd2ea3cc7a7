"""An XY grid of pictures: checkpoints downwards, prompts and seeds across."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from sdprep.errors import UserError
from sdtrain import contact_sheet
from sdtrain.sampling import Style, checkpoint_folder, load_checkpoint, pictures_of, shown

SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")


def draw_grid(
    paths: Sequence[Path], prompts: Sequence[str], to: Path, seeds: Sequence[int] = ()
) -> dict[str, Any]:
    """Draw the same prompts and seeds with several checkpoints, side by side.

    Args:
        paths: checkpoints, or run folders for their newest.
        prompts: a column each.
        to: the picture to write.
        seeds: a column each for every prompt; default: the seed of the first recipe.

    Returns:
        path, and what the rows and columns are.

    Raises:
        UserError: the picture's name has no known ending.
    """
    if to.suffix.lower() not in SUFFIXES:
        raise UserError(f"{to} is no picture's name", f"End it in {', '.join(SUFFIXES)}.")
    rows: list[tuple[str, list[Image.Image]]] = []
    used = list(seeds)
    for path in paths:
        found = checkpoint_folder(path)
        recipe, family, samples_seen = load_checkpoint(found)
        style = Style.of(recipe, family)
        used = used or [style.seed]
        by_seed = [pictures_of(family, prompts, replace(style, seed=seed)) for seed in used]
        cells = [pictures[at] for at in range(len(prompts)) for pictures in by_seed]
        rows.append((f"{found.parent.parent.name} @ {samples_seen:,}", cells))
    columns = [
        shown(prompt) if len(used) == 1 else f"{shown(prompt)} (seed {seed})"
        for prompt in prompts
        for seed in used
    ]
    to.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet.grid(rows, columns, "checkpoint").save(to)
    return {"path": str(to), "rows": [label for label, _ in rows], "columns": columns}
