"""`[tracking]`: where curves and pictures go besides `metrics.jsonl`, which is always written."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from sdprep.errors import MissingExtraError
from sdprep.recipe import Section

if TYPE_CHECKING:
    from sdtrain.recipe import TrainRecipe
    from sdtrain.run_folder import RunFolder

DEFAULT_PROJECT = "sdtrain"
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


class TrackingSection(Section):
    """Services that draw the curves of a run."""

    services: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        ("tensorboard",), alias="with", description="tensorboard, wandb, trackio; empty: none."
    )
    project: str | None = Field(
        None, min_length=1, description=f'Of wandb and trackio; default: "{DEFAULT_PROJECT}".'
    )
    name: str | None = Field(
        None, min_length=1, description="Of the run there; default: the output folder's."
    )

    @field_validator("services", mode="after")
    @classmethod
    def _named_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("each service is named once")
        return value

    @model_validator(mode="after")
    def _names_are_for_someone(self) -> TrackingSection:
        for key in ("project", "name"):
            if getattr(self, key) is not None and not set(self.services) - {"tensorboard"}:
                raise ValueError(f"{key} is for wandb and trackio, and neither is in `with`")
        return self

    def require(self) -> None:
        """Refuse a service whose package is not installed, before anything is opened.

        Raises:
            MissingExtraError: names it and the extra.
        """
        for service in self.services:
            if find_spec(_PACKAGES[service]) is None:
                extra = "tensorboard" if service == "tensorboard" else "track"
                raise MissingExtraError(_PACKAGES[service], extra, f"[tracking] with {service}")


def open_trackers(recipe: TrainRecipe, folder: RunFolder, samples_seen: int | None) -> list[Any]:
    """Where metrics go: `metrics.jsonl`, and the recipe's services.

    Args:
        recipe: of the run.
        folder: of the run.
        samples_seen: the clock of the checkpoint that the run goes on from; None: a fresh run.
    """
    from sdtrain.trackers.jsonl import JsonlTracker
    from sdtrain.trackers.pace import PACE, PaceTracker
    from sdtrain.trackers.service import ServiceTracker
    from sdtrain.trackers.tensorboard import TensorBoardTracker

    found: list[Any] = [
        JsonlTracker(folder.metrics, samples_seen),
        PaceTracker(folder.path / PACE, samples_seen or 0),
    ]
    for service in recipe.tracking.services:
        if service == "tensorboard":
            found.append(TensorBoardTracker(folder.tensorboard, samples_seen))
        else:
            found.append(ServiceTracker(service, recipe, folder, is_resumed=bool(samples_seen)))
    return found
