"""An XY grid of pictures: models downwards; prompts, samplers, guidance and seeds across."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from sdprep.console import progress
from sdprep.errors import UserError
from sdtrain import contact_sheet, samplers, variety
from sdtrain.family import Family
from sdtrain.grid_page import write_grid_page
from sdtrain.in_turn import Candidate, InTurn, candidates
from sdtrain.outputs import require_file
from sdtrain.recipe import TrainRecipe
from sdtrain.sample_files import save_whole, shown
from sdtrain.sampling import Drawing, Style, drawings_of

SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
Group = tuple[str, str | None, float]
"""Prompt, sampler and guidance: the columns that differ only in their seed."""


@dataclass(frozen=True)
class Axes:
    """What is drawn across; what is not given comes from the first recipe.

    Args:
        prompts: at least one.
        seeds: first noises.
        guidance_scales: strengths of classifier-free guidance.
        samplers: names of `samplers.NAMES`.
        num_inference_steps: steps of every sampler.
    """

    prompts: Sequence[str]
    seeds: Sequence[int] = ()
    guidance_scales: Sequence[float] = ()
    samplers: Sequence[str | None] = ()
    num_inference_steps: int | None = None

    def filled(self, recipe: TrainRecipe) -> Axes:
        """With what a recipe says where nothing was given.

        Raises:
            UserError: a value is given twice.
        """
        sampling = recipe.sampling
        found = replace(
            self,
            seeds=self.seeds or (recipe.seed,),
            guidance_scales=self.guidance_scales or (sampling.guidance_scale,),
            samplers=self.samplers or (sampling.sampler,),
            num_inference_steps=self.num_inference_steps or sampling.num_inference_steps,
        )
        for sampler in found.samplers:
            samplers.check_name(sampler)
        for name in ("prompts", "seeds", "guidance_scales", "samplers"):
            values = list(getattr(found, name))
            for value in values:
                if values.count(value) > 1:
                    raise UserError(f"{name}: {value!r} is given twice", "Each is drawn once.")
        return found

    @property
    def groups(self) -> list[Group]:
        """Every prompt with every sampler and guidance."""
        return list(product(self.prompts, self.samplers, self.guidance_scales))

    @property
    def columns(self) -> list[str]:
        """Labels, the seeds of a group side by side; an axis of one value is not repeated."""
        return [
            ", ".join([self.group_label(group), *([f"seed {seed}"] if len(self.seeds) > 1 else [])])
            for group in self.groups
            for seed in self.seeds
        ]

    @property
    def sheet_labels(self) -> list[str]:
        """The same for a picture, where a long prompt is cut: the rest has a line of its own."""
        return [
            "\n".join(
                [
                    " ".join(shown(group[0]).split()),
                    *self._settings(group, f"seed {seed}" if len(self.seeds) > 1 else ""),
                ]
            )
            for group in self.groups
            for seed in self.seeds
        ]

    def _settings(self, group: Group, seed: str) -> list[str]:
        """One line of what a column has besides its prompt; none where that is nothing."""
        words = [*self._differing(group), seed]
        return [", ".join(word for word in words if word)] if any(words) else []

    def _differing(self, group: Group) -> list[str]:
        _, sampler, guidance = group
        return [
            *([sampler or "own sampler"] if len(self.samplers) > 1 else []),
            *([f"CFG {guidance:g}"] if len(self.guidance_scales) > 1 else []),
        ]

    def group_label(self, group: Group) -> str:
        """A group as people read it."""
        return ", ".join([shown(group[0]), *self._differing(group)])

    @property
    def fixed(self) -> str:
        """What all pictures share."""
        words = [f"{self.num_inference_steps} steps"]
        if len(self.samplers) == 1:
            words.append(f"sampler {self.samplers[0] or 'of the model'}")
        if len(self.guidance_scales) == 1:
            words.append(f"CFG {self.guidance_scales[0]:g}")
        if len(self.seeds) == 1:
            words.append(f"seed {self.seeds[0]}")
        return ", ".join(words)


@dataclass(frozen=True)
class Row:
    """One model's pictures.

    Args:
        label: of the model.
        cells: a picture, or its path, for each column.
        spreads: between the seeds of each group; None with one seed.
    """

    label: str
    cells: Sequence[contact_sheet.Cell]
    spreads: Sequence[float | None] = field(default=())


def draw_row(
    family: Family, candidate: Candidate, axes: Axes, spread: variety.Spread
) -> tuple[list[Image.Image], list[float | None]]:
    """Pictures of all columns, and the spread of every group."""
    style = Style.of(candidate.recipe, family)
    assert axes.num_inference_steps is not None, "filled before"
    style = replace(style, num_inference_steps=axes.num_inference_steps)
    found: dict[Group, list[Drawing]] = {group: [] for group in axes.groups}
    for sampler, guidance, seed in product(axes.samplers, axes.guidance_scales, axes.seeds):
        this = replace(style, sampler=sampler, guidance_scale=guidance, seed=seed)
        for prompt, drawing in zip(
            axes.prompts, drawings_of(family, axes.prompts, this), strict=True
        ):
            found[prompt, sampler, guidance].append(drawing)
    pictures = [drawing.picture for drawings in found.values() for drawing in drawings]
    return pictures, [spread(drawings) for drawings in found.values()]


def draw_grid(
    paths: Sequence[Path],
    axes: Axes,
    to: Path,
    *,
    has_page: bool = True,
    embedding: str | None = None,
    device: str | None = None,
    ema: bool = False,
) -> dict[str, Any]:
    """Draw the same columns with several models, side by side.

    Args:
        paths: checkpoints, run folders for their newest, diffusers folders, or the word `base`.
        axes: what to draw.
        to: the picture to write; the page of the same name lies beside it.
        has_page: whether to write the page.
        embedding: a CLIP or SigLIP to measure variety with; default: VAE latents.
        device: where to draw; default: as the recipe says.
        ema: whether the averaged weights of checkpoints are taken.

    Returns:
        path, page, what rows and columns are, and their variety.

    Raises:
        UserError: the picture's name has no known ending, or something cannot be opened.
    """
    if to.suffix.lower() not in SUFFIXES:
        raise UserError(f"{to} is no picture's name", f"End it in {', '.join(SUFFIXES)}.")
    require_file(to, SUFFIXES)
    wanted = candidates(paths, ema=ema)
    axes = axes.filled(wanted[0].recipe)
    spread, space = spread_in(embedding, device)
    models, rows = InTurn(device), []
    with progress("drawing", len(wanted), "rows") as bar:
        for candidate in wanted:
            pictures, spreads = draw_row(models.family(candidate), candidate, axes, spread)
            rows.append(Row(candidate.label, pictures, spreads))
            bar.advance()
    return write_grid(rows, axes, to, space, has_page=has_page)


def spread_in(embedding: str | None, device: str | None) -> tuple[variety.Spread, str]:
    """How variety is measured, and the name of that space."""
    if embedding is None:
        return variety.latent_spread, variety.LATENTS
    from sdtrain.setup import pick_device

    found = variety.EmbeddingSpread(embedding, str(pick_device(device or "auto")))
    return found, found.name


def write_grid(
    rows: Sequence[Row],
    axes: Axes,
    to: Path,
    space: str,
    *,
    has_page: bool = True,
    refresh_seconds: int | None = None,
) -> dict[str, Any]:
    """Write the picture, and the page beside it, each in one go.

    Returns:
        as `--json` prints it.
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    relative = relative_spreads(rows)
    # A picture of thousands of rows is of no use to anyone; the page has all of them.
    kept = contact_sheet.spread(range(len(rows)))
    picture = contact_sheet.grid(
        [(rows[at].label, rows[at].cells) for at in kept],
        axes.sheet_labels,
        "model",
        _footer(rows, kept, relative, len(axes.seeds)),
    )
    save_whole(picture, to)
    page = to.with_suffix(".html") if has_page else None
    if page is not None:
        write_grid_page(page, rows, axes, relative, space, refresh_seconds)
    found = _variety(rows, axes, relative)
    return {
        "path": str(to),
        "page": str(page) if page else None,
        "rows": [row.label for row in rows],
        "columns": axes.columns,
        "variety": {"space": space, "rows": found} if found else None,
    }


def relative_spreads(rows: Sequence[Row]) -> list[list[float | None]]:
    """Every row's spreads in units of the first row's."""
    return [
        [
            variety.relative(spread, first)
            for spread, first in zip(row.spreads, rows[0].spreads, strict=True)
        ]
        for row in rows
    ]


def _variety(
    rows: Sequence[Row], axes: Axes, relative: Sequence[Sequence[float | None]]
) -> list[dict[str, Any]]:
    if len(axes.seeds) < 2:
        return []
    names = ("prompt", "sampler", "guidance_scale")
    return [
        {
            "row": row.label,
            "mean_relative": variety.mean(shares),
            "groups": [
                {**dict(zip(names, group, strict=True)), "spread": spread, "relative": share}
                for group, spread, share in zip(axes.groups, row.spreads, shares, strict=True)
            ],
        }
        for row, shares in zip(rows, relative, strict=True)
    ]


def _footer(
    rows: Sequence[Row],
    kept: Sequence[int],
    relative: Sequence[Sequence[float | None]],
    num_seeds: int,
) -> contact_sheet.Footer | None:
    """Variety below the pictures, at the first column of every group."""
    if num_seeds < 2:
        return None
    lines = [
        (
            rows[at].label,
            {k * num_seeds: "–" if x is None else f"{x:.2f}" for k, x in enumerate(relative[at])},
        )
        for at in kept
    ]
    return f"variety between seeds ({rows[0].label} = 1)", lines
