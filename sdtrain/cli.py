"""The `sdtrain` command: parse, call, print. Every command imports what it needs in its body."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from sdprep.console import out, print_json, run_app

app = typer.Typer(
    name="sdtrain",
    help="Fine-tune Stable Diffusion models, with validation that can be trusted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Recipe = Annotated[Path, typer.Argument(help="The recipe, a TOML file.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key. Repeats."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@app.command(
    epilog="Example: sdtrain run recipes/tiny/sd15.toml --set train.samples=64 "
    "(run it again to resume)"
)
def run(
    recipe: Recipe,
    settings: Set = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done (sdtrain check).")
    ] = False,
    resume: Annotated[
        str, typer.Option(metavar="auto|never|PATH", help="Where to go on from.")
    ] = "auto",
    accept_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Go on although this recipe key changed. Repeats."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train; run the same command again to resume."""
    from sdtrain.recipe import load_train_recipe

    loaded = load_train_recipe(recipe, settings or ())
    if dry_run:
        _check(loaded, as_json)
        return
    from sdtrain.trainer import train

    outcome = train(loaded, resume=resume, accept=accept_change or ())
    if as_json:
        print_json(outcome.to_json())
    elif outcome.is_finished:
        out.print(f"{outcome.output}: {outcome.samples_seen:,} samples done", markup=False)


@app.command(epilog="Example: sdtrain check recipes/train/sd15-lora.toml")
def check(recipe: Recipe, settings: Set = None, as_json: Json = False) -> None:
    """Say everything that can be known without training."""
    from sdtrain.recipe import load_train_recipe

    _check(load_train_recipe(recipe, settings or ()), as_json)


def _check(recipe: Any, as_json: bool) -> None:
    from sdtrain.check import describe
    from sdtrain.check_text import check_text
    from sdtrain.setup import open_setup

    setup = open_setup(recipe)
    found = describe(setup)
    if as_json:
        print_json(found)
    else:
        out.print(check_text(found, setup.plan.table()), markup=False)


@app.command(epilog="Example: sdtrain inspect recipes/tiny/sdxl.toml -n 2 --to look/")
def inspect(
    recipe: Recipe,
    to: Annotated[Path, typer.Option(help="Folder for the pictures and the page.")],
    count: Annotated[int, typer.Option("-n", min=1, help="Optimizer steps to show.")] = 4,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Show the first batches as the model sees them."""
    from sdtrain.inspect import inspect as write
    from sdtrain.recipe import load_train_recipe
    from sdtrain.setup import open_setup

    found = write(open_setup(load_train_recipe(recipe, settings or ())), to, count)
    if as_json:
        print_json(found)
    else:
        out.print(found["path"], markup=False)


@app.command(
    epilog="Example: sdtrain validate recipes/tiny/sd15.toml --checkpoint runs/a/checkpoints/64"
)
def validate(
    recipe: Recipe,
    checkpoints: Annotated[
        list[Path],
        typer.Option(
            "--checkpoint", help="RUN/checkpoints/SAMPLES, or a diffusers folder. Repeats."
        ),
    ],
    to: Annotated[
        Path | None,
        typer.Option(help="Folder for the loss matrices; default: the output plus -validate."),
    ] = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Evaluate checkpoints and the base model on the recipe's probe, and compare them."""
    from sdtrain import validate as validation
    from sdtrain.recipe import load_train_recipe

    loaded = load_train_recipe(recipe, settings or ())
    found = validation.validate_checkpoints(loaded, checkpoints, to)
    if as_json:
        print_json(validation.to_json(found))
    else:
        out.print(validation.report(found), markup=False)


@app.command(epilog="Example: sdtrain compare runs/first runs/second")
def compare(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="A [B …]",
            help="Run folders, checkpoints of runs, or .npz files; one run alone is compared "
            "with its own start.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Say whether B is better than A on the same probe, and how sure that is."""
    from sdtrain.compare import compare_paths, text

    pairs = compare_paths(paths)
    if as_json:
        print_json({"comparisons": [pair.to_json() for pair in pairs]})
    else:
        out.print(text(pairs), markup=False)


Prompts = Annotated[
    Path, typer.Option(help="Text file, one prompt a line; an empty line is the empty prompt.")
]


@app.command(epilog="Example: sdtrain sample runs/first --prompts prompts.txt --to pictures/")
def sample(
    checkpoint: Annotated[
        Path, typer.Argument(help="RUN/checkpoints/SAMPLES, or a run for its newest.")
    ],
    prompts: Prompts,
    to: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    seed: Annotated[int | None, typer.Option(help="Keys the noise; default: the run's.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the sampler; default: the run's.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Guidance scale; default: the run's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw prompts with a checkpoint."""
    from sdtrain.sampling import read_prompts, sample_checkpoint

    found = sample_checkpoint(
        checkpoint,
        read_prompts(prompts),
        to,
        seed=seed,
        num_inference_steps=steps,
        guidance_scale=guidance,
    )
    if as_json:
        print_json(found)
    else:
        out.print(found["path"], markup=False)


@app.command(
    epilog="Example: sdtrain grid runs/a/checkpoints/16 runs/a/checkpoints/64 "
    "--prompts prompts.txt --to grid.png"
)
def grid(
    checkpoints: Annotated[list[Path], typer.Argument(metavar="CHECKPOINT…", help="One row each.")],
    prompts: Prompts,
    to: Annotated[Path, typer.Option(help="The picture to write.")],
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", help="One column per prompt and seed. Repeats.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw the same prompts with several checkpoints, side by side."""
    from sdtrain.grid import draw_grid
    from sdtrain.sampling import read_prompts

    found = draw_grid(checkpoints, read_prompts(prompts), to, seeds or ())
    if as_json:
        print_json(found)
    else:
        out.print(found["path"], markup=False)


@app.command(epilog="Example: sdtrain report runs/first")
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    as_json: Json = False,
) -> None:
    """Write a run's page anew: report.html, all in one file."""
    from sdtrain.page import write_page

    path = write_page(run_folder)
    if as_json:
        print_json({"path": str(path)})
    else:
        out.print(str(path), markup=False)


@app.command(
    epilog="Example: sdtrain export runs/first --format single-file --to first.safetensors "
    "--dtype fp16"
)
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
    as_json: Json = False,
) -> None:
    """Write a checkpoint for ComfyUI, A1111 or diffusers."""
    from sdtrain.export import export as write

    known = {"author": author, "description": description}
    about = {key: value for key, value in known.items() if value is not None}
    found = write(checkpoint, form, to, dtype=dtype, title=title, about=about)
    if as_json:
        print_json(found)
    else:
        out.print(found["path"], markup=False)


@app.command(epilog="Example: sdtrain tiny sd15 models/tiny-sd15")
def tiny(
    family: Annotated[str, typer.Argument(help="A family, such as sd15 or sdxl.")],
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


@app.command(epilog="Example: sdtrain plugins --json")
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


def main() -> None:
    """Entry point of the console script."""
    # transformers warns about torchvision, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    run_app(app)


if __name__ == "__main__":
    main()
