"""The set `forgetting`: images from outside the training set, to see what the model unlearns.

They come from a folder or data set, or are drawn once from prompts by the model at sample 0, so
that "does it still know cars?" needs no pictures of cars.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from sdprep.console import say, warn
from sdprep.errors import DataError
from sdprep.prompt_policy import PromptPolicy
from sdprep.recipe import Section
from sdprep.seeding import digest, integer
from sdtrain.data_section import called
from sdtrain.outputs import write_text_whole

if TYPE_CHECKING:
    from sdtrain.buckets import Assignment
    from sdtrain.dataset import Rows
    from sdtrain.setup import Setup

NAME = "forgetting"
DRAWN = "forgetting-images"
LISTING = "images.json"

PromptOf = Callable[[Mapping[str, Any]], str]
"""Record of a row to the text that is shown with it."""


class ForgettingSection(Section):
    """Images from outside the training set whose loss should not rise."""

    path: str | None = Field(
        None, min_length=1, description="Folder of images with texts beside them, or a data set."
    )
    revision: str | None = Field(None, description="Commit, tag or branch of a Hub data set.")
    image_column: str | None = Field(None, description="Column with the pictures.")
    caption_column: str | None = Field(None, description="Column with the text.")
    prompts: tuple[str, ...] = Field(
        (), description="Texts that the model at sample 0 draws images of, once."
    )
    images: int = Field(
        32, gt=0, description="Images at most; prompts are drawn in turn, to so many in all."
    )
    num_inference_steps: int = Field(20, gt=0, description="Steps of the sampler for prompts.")
    guidance_scale: float = Field(5.0, ge=0.0, description="Classifier-free guidance for prompts.")

    @model_validator(mode="after")
    def _one_origin(self) -> ForgettingSection:
        if (self.path is None) == (not self.prompts):
            raise ValueError("needs either path or prompts, and not both")
        of_path = {"revision", "image_column", "caption_column"}
        of_prompts = {"num_inference_steps", "guidance_scale"}
        idle = self.model_fields_set & (of_prompts if self.path else of_path)
        if idle:
            origin = "path" if self.path else "prompts"
            raise ValueError(f"{', '.join(sorted(idle))} has no effect with {origin}")
        return self


@dataclass(frozen=True)
class Outside:
    """Usable images from outside the training set.

    Args:
        rows: the images.
        assignment: their buckets.
        prompt_of: their texts.
    """

    rows: Rows
    assignment: Assignment
    prompt_of: PromptOf


def open_outside(setup: Setup, folder: Path, samples_seen: int, *, is_run: bool) -> Outside:
    """Open the images, or have the model draw them.

    Args:
        setup: the run; where images are drawn, its model must be the base model.
        folder: `validation/` of the run; what was drawn lies there.
        samples_seen: the clock.
        is_run: whether what is drawn is kept in the folder.

    Raises:
        DataError: there are none, or the drawn ones of a run that goes on are gone.
    """
    section = setup.recipe.validation.forgetting
    assert section is not None, "the caller looked"
    if section.path is not None:
        return open_path(setup, section)
    rows = _drawn(setup, section, folder, samples_seen, is_run=is_run)
    return _usable(setup, rows, _caption)


def open_path(setup: Setup, section: ForgettingSection) -> Outside:
    """Open a folder or a data set, without what is also trained on or validated with."""
    from sdprep.prompts import validation_prompt
    from sdtrain.dataset import open_data
    from sdtrain.picture_rows import is_picture_folder, read_folder
    from sdtrain.recipe import DataSection

    assert section.path is not None, "the caller looked"
    rows: Rows
    prompt_of: PromptOf = _caption
    if is_picture_folder(Path(section.path)):
        rows = read_folder(Path(section.path))
    else:
        keys = ("path", "revision", "image_column", "caption_column")
        asked = DataSection(**{key: getattr(section, key) for key in keys})
        with called("validation.forgetting"):
            data = open_data(asked, PromptPolicy(), needs_split=False)
        rows = data.train
        policy, seed = data.policy, setup.evaluation_seed

        def prompt_of(record: Mapping[str, Any]) -> str:
            return validation_prompt(record, policy, seed)

    splits = [each for each in (setup.data.train, setup.data.validation) if each is not None]
    shared = sorted({row for split in splits for row in rows.ids.rows_in(split.ids)})
    for row in shared:
        rows.refused.setdefault(row, "in_data_set: it is trained on or validated with")
    if shared:
        warn(f"{len(shared)} images of {section.path} are also in the data set and are left out")
    return _usable(setup, rows, prompt_of)


def _usable(setup: Setup, rows: Rows, prompt_of: PromptOf) -> Outside:
    from sdtrain.buckets import assign
    from sdtrain.setup import bucket_sizes

    sizes = bucket_sizes(setup.recipe, setup.family)
    assignment = assign(rows, sizes, setup.recipe.data.max_upscale)
    reasons = ", ".join(f"{why} {count}" for why, count in assignment.reasons().items())
    if not len(assignment.kept):
        raise DataError(
            f"validation.forgetting has no usable image ({reasons or 'it is empty'})",
            "Give images that are not trained on and large enough for data.resolution_px.",
        )
    if assignment.refused:
        count = len(assignment.refused)
        warn(f"{NAME}: {count} of {len(rows)} images are not usable ({reasons})")
    return Outside(rows, assignment, prompt_of)


def _caption(record: Mapping[str, Any]) -> str:
    return str(record["caption"] or "")


# --- drawn from prompts --------------------------------------------------------------------------


def _drawn(
    setup: Setup, section: ForgettingSection, folder: Path, samples_seen: int, *, is_run: bool
) -> Rows:
    """Images of the prompts: those of the folder, else drawn now."""
    from sdtrain.picture_rows import PictureRows
    from sdtrain.sampling import Style

    seed = setup.evaluation_seed
    plain = Style.of(setup.recipe, setup.family)
    style = Style(seed, plain.side_px, section.num_inference_steps, section.guidance_scale)
    model = setup.conditions()["model_fingerprint"]
    prompts = [section.prompts[k % len(section.prompts)] for k in range(section.images)]
    place = folder / DRAWN / digest(NAME, json.dumps(prompts), style, model)
    world = setup.world
    if not world.on_main((place / LISTING).is_file):
        if samples_seen:
            raise DataError(
                f"{place} is gone",
                "Its images were drawn by the model at sample 0; put it back, or start afresh.",
            )
        pictures: list[Any] = []
        if world.is_main or setup.engine.is_sharded:  # a sharded model takes all processes
            pictures = _draw(setup, prompts, style, len(section.prompts))
        if not is_run:
            return PictureRows(pictures, prompts)
        world.on_main(lambda: _keep(place, pictures, prompts))
    return _read(place)


def _draw(setup: Setup, prompts: Sequence[str], style: Any, num_different: int) -> list[Any]:
    from dataclasses import replace

    from sdtrain.sampling import pictures_of

    say(f"drawing {len(prompts)} images with the base model, to see later what it forgets")
    found = []
    for at, prompt in enumerate(prompts):
        key = integer(style.seed, NAME, at // num_different)
        found += pictures_of(setup.family, [prompt], replace(style, seed=key))
    return found


def _keep(place: Path, pictures: Sequence[Any], prompts: Sequence[str]) -> None:
    """Write PNGs, which lose nothing; the list comes last, so a kill leaves no half of it."""
    place.mkdir(parents=True, exist_ok=True)
    names = [f"{at:03d}.png" for at in range(len(pictures))]
    for name, picture in zip(names, pictures, strict=True):
        picture.save(place / name)
    entries = [{"file": n, "prompt": p} for n, p in zip(names, prompts, strict=True)]
    text = json.dumps(entries, indent=1, ensure_ascii=False)
    write_text_whole(place / LISTING, text + "\n")


def _read(place: Path) -> Rows:
    from PIL import Image

    from sdtrain.picture_rows import PictureRows

    entries = json.loads((place / LISTING).read_text(encoding="utf-8"))
    pictures = []
    for entry in entries:
        try:
            with Image.open(place / entry["file"]) as picture:
                pictures.append(picture.convert("RGB"))
        except OSError as error:
            raise DataError(
                f"{place / entry['file']} cannot be read: {error}",
                "It was drawn at sample 0 and is needed to go on.",
            ) from None
    return PictureRows(pictures, [entry["prompt"] for entry in entries])
