"""The preparation recipe: one model, which documents every option of `sdprep run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from sdprep import plugins
from sdprep.duplicates import DuplicatesConfig
from sdprep.prompts import PromptPolicy
from sdprep.publish import PublishConfig
from sdprep.recipe import Section, column_name
from sdprep.select import SelectConfig
from sdprep.split import SplitConfig
from sdprep.tags import TagsConfig


class PrepRecipe(Section):
    """Everything from photos to a published data set; paths are relative to where you stand."""

    table: Path = Field(description="The table, a folder that ends in .lance; made if missing.")
    seed: int = Field(0, ge=0, description="Every stage draws from it unless it has its own.")
    storage: str = Field(
        "auto",
        pattern="^(auto|embed|link)$",
        description="embed the images, link to their files, or decide by size (20 GB).",
    )
    source: list[plugins.union("source")] = Field(  # type: ignore[valid-type]
        default_factory=list, description="Where images come from, in order."
    )
    score: list[plugins.union("scorer")] = Field(  # type: ignore[valid-type]
        default_factory=list, description="Scorers to run."
    )
    tag: list[plugins.union("tagger")] = Field(  # type: ignore[valid-type]
        default_factory=list, description="Taggers to run."
    )
    detect: list[plugins.union("detector")] = Field(  # type: ignore[valid-type]
        default_factory=list, description="Detectors to run."
    )
    caption: list[plugins.union("captioner")] = Field(  # type: ignore[valid-type]
        default_factory=list, description="Captioners to run."
    )
    tags: TagsConfig | None = Field(None, description="How tags are composed.")
    duplicates: DuplicatesConfig | None = Field(None, description="Finds duplicates, if present.")
    select: SelectConfig | None = Field(None, description="Which images to keep, if present.")
    split: SplitConfig | None = Field(None, description="Train and validation, if present.")
    policy: PromptPolicy = Field(default_factory=PromptPolicy, description="Prompt policy.")
    publish: PublishConfig | None = Field(None, description="Where the data set goes, if present.")

    @field_validator("table")
    @classmethod
    def _is_a_table_name(cls, path: Path) -> Path:
        if path.suffix != ".lance":
            raise ValueError("must end in .lance")
        return path

    @model_validator(mode="after")
    def _columns_differ(self) -> PrepRecipe:
        columns = [column for _, column, _ in self.annotators()]
        twice = sorted({column for column in columns if columns.count(column) > 1})
        if twice:
            raise ValueError(f'two plugins fill {twice[0]}; tell them apart with as = "name"')
        return self

    def annotators(self) -> list[tuple[str, str, Any]]:
        """(kind, column, config) of every annotator, in the order they are listed."""
        groups = {
            "scorer": self.score,
            "tagger": self.tag,
            "detector": self.detect,
            "captioner": self.caption,
        }
        return [
            (kind, column_name(kind, config), config)
            for kind, configs in groups.items()
            for config in configs
        ]
