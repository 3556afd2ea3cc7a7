"""The `sdprep` command: every verb, where it lives, and an example of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from sdprep.commands import annotate, curate, ingest, look, output
from sdprep.console import run_app

app = typer.Typer(
    name="sdprep",
    help="Turn a pile of images into a curated, leak-free Hugging Face data set.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tags_app = typer.Typer(help="Check alias lists, count tags.", no_args_is_help=True)


def _add(name: str, command: Callable[..., Any], example: str, to: typer.Typer = app) -> None:
    to.command(name, epilog=f"Example: {example}")(command)


_annotator = annotate.annotator_command
_scorers = _annotator("scorer", "Run scorers over the images that have no score yet.")
_detectors = _annotator("detector", "Run detectors over the images that have no boxes yet.")
_captioners = _annotator("captioner", "Run captioners over the images without their caption.")

_add("ingest", ingest.ingest, "sdprep ingest photos/ photos.lance")
_add("score", _scorers, "sdprep score photos.lance --with technical")
_add("tag", annotate.tag, "sdprep tag photos.lance --with sidecar --aliases danbooru.csv")
_add("detect", _detectors, "sdprep detect photos.lance --with owlv2")
_add("caption", _captioners, "sdprep caption photos.lance --with vlm --model org/model")
app.add_typer(tags_app, name="tags")
_add("lint", annotate.tags_lint, "sdprep tags lint danbooru.csv", tags_app)
_add("stats", annotate.tags_stats, "sdprep tags stats photos.lance --count 20", tags_app)
_add("dedup", curate.dedup, "sdprep dedup photos.lance --keep best")
_add("select", curate.select, 'sdprep select photos.lance --where "width * height >= 262144"')
_add("split", curate.split, "sdprep split photos.lance --validation 0.05")
_add("prompts", output.prompts, "sdprep prompts photos.lance --count 5")
_add("publish", output.publish, "sdprep publish photos.lance --to photos-prepared")
_add("export", output.export, "sdprep export photos.lance --to photos-kohya --format kohya")
_add("run", output.run, "sdprep run recipes/prep/photos.toml --set split.validation=0.1")
_add("status", look.status, "sdprep status photos.lance")
_add("history", look.history, "sdprep history photos.lance")
_add("undo", look.undo, "sdprep undo photos.lance split")
_add("show", look.show, "sdprep show photos.lance 0f3a --to picture.png")
_add("plugins", look.plugins, "sdprep plugins --json")


def main() -> None:
    """Entry point of the console script."""
    run_app(app)


if __name__ == "__main__":
    main()
