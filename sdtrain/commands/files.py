"""Commands that write models, and list what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sdprep.console import out, print_json
from sdtrain.commands.common import Average, Json


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="RUN/checkpoints/SAMPLES, a run for its newest, or a diffusers folder."
        ),
    ],
    form: Annotated[
        str,
        typer.Option("--format", metavar="single-file|diffusers|lora-kohya|lora-diffusers"),
    ],
    to: Annotated[Path, typer.Option(help="File or folder to make.")],
    dtype: Annotated[str, typer.Option(metavar="fp32|fp16|bf16", help="Precision.")] = "fp32",
    title: Annotated[str | None, typer.Option(help="Default: the name of the file.")] = None,
    author: Annotated[str | None, typer.Option(help="Who made the model.")] = None,
    description: Annotated[str | None, typer.Option(help="What the model is.")] = None,
    ema: Average = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint for ComfyUI, A1111 or diffusers."""
    from sdtrain.export import export as write

    known = {"author": author, "description": description}
    about = {key: value for key, value in known.items() if value is not None}
    found = write(checkpoint, form, to, dtype=dtype, title=title, about=about, ema=ema)
    if as_json:
        print_json(found)
    else:
        out.print(found["path"], markup=False)


def tiny(
    family: Annotated[str, typer.Argument(help="A family, as `sdtrain plugins` lists them.")],
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.")],
    seed: Annotated[int, typer.Option(help="Keys every weight.")] = 0,
    as_json: Json = False,
) -> None:
    """Write a tiny random model of a family: for trials, tests and the demo."""
    from sdtrain.tiny import write_tiny

    written = write_tiny(family, path, seed)
    if as_json:
        print_json({"path": str(written), "family": family, "seed": seed})
    else:
        out.print(str(written), markup=False)


def plugins(as_json: Json = False) -> None:
    """List families, losses, weightings, adapters, optimizers and schedules with their options."""
    from sdprep.plugins import TRAIN_KINDS, configs

    found = {kind: {n: _options(c) for n, c in configs(kind).items()} for kind in TRAIN_KINDS}
    if as_json:
        print_json(found)
        return
    for kind, members in found.items():
        out.print(f"{kind}", markup=False)
        for name, options in members.items():
            out.print(f"  {name}", markup=False)
            for option in options:
                default = "required" if option["required"] else f"default {option['default']!r}"
                out.print(
                    f"    {option['name']}: {option['description']} ({default})", markup=False
                )


def _options(config: Any) -> list[dict[str, Any]]:
    fields = {name: info for name, info in config.model_fields.items() if name != "type"}
    return [
        {
            "name": info.alias or name,
            "description": info.description or "",
            "required": info.is_required(),
            "default": None if info.is_required() else info.get_default(call_default_factory=True),
        }
        for name, info in fields.items()
    ]
