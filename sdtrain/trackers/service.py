"""Weights & Biases and Trackio, through the tracker classes of Accelerate.

Offline is the services' own matter: `WANDB_MODE=offline` keeps a run on disk until `wandb sync`,
Trackio is local unless told otherwise. Only the recipe and numbers are sent; neither the console,
nor code, nor the repository. What fails while a run trains ends the curves there, never the run.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdprep.console import warn
from sdprep.errors import UserError
from sdtrain.outputs import write_text_whole
from sdtrain.trackers.curves import bins, curves
from sdtrain.tracking import DEFAULT_PROJECT

if TYPE_CHECKING:
    from sdtrain.recipe import TrainRecipe
    from sdtrain.run_folder import RunFolder

IDS = "tracking.json"


class ServiceTracker:
    """Sends each line at its clock; after a resume to the same run of the service.

    Args:
        service: `wandb` or `trackio`.
        recipe: of the run, which the service keeps as its configuration.
        folder: of the run; `tracking.json` in it remembers what the run is called there.
        is_resumed: whether the run goes on.

    Raises:
        UserError: the service cannot be opened.
    """

    def __init__(
        self, service: str, recipe: TrainRecipe, folder: RunFolder, *, is_resumed: bool
    ) -> None:
        self.service, self._is_on = service, True
        file = folder.path / IDS
        known = _read(file)
        name = recipe.tracking.name or folder.path.resolve().name
        before = known.get(service) if is_resumed else None
        try:
            with _talk():
                self._tracker = _opened(service, recipe, folder.path, name, before)
                self._tracker.store_init_configuration(recipe.resolved())
        except Exception as error:
            raise UserError(
                f"[tracking] {service} cannot be opened: {error}",
                "Log in first (wandb login), or set WANDB_MODE=offline."
                if service == "wandb"
                else "Look at its own message, or leave it out of tracking.with.",
            ) from error
        run: Any = self._tracker.tracker
        known[service] = str(run.id if service == "wandb" else run.name)
        write_text_whole(file, json.dumps(known) + "\n")

    def log(self, line: Mapping[str, Any]) -> None:
        """Send one metrics line."""
        values: dict[str, Any] = {**curves(line)}
        histogram = bins(line)
        if histogram is not None and self.service == "wandb":
            import wandb

            heights, edges = (np.array(each) for each in histogram)
            values[f"{line['set']}/loss_by_noise_level"] = wandb.Histogram(
                np_histogram=(heights, edges)
            )
        clock = int(line["samples_seen"])
        if values:
            self._safely(lambda: self._tracker.log(values, step=clock))

    def pictures(self, named: Mapping[str, Sequence[Path]], samples_seen: int) -> None:
        """Send pictures by prompt."""
        self._safely(lambda: self._send(named, samples_seen))

    def _send(self, named: Mapping[str, Sequence[Path]], samples_seen: int) -> None:
        from PIL import Image

        opened = {
            f"samples/{k}": [Image.open(path) for path in paths] for k, paths in named.items()
        }
        if self.service == "wandb":
            self._tracker.log_images(opened, step=samples_seen)
            return
        import trackio

        images = {
            key if len(of_prompt) == 1 else f"{key}/{at}": trackio.Image(picture)
            for key, of_prompt in opened.items()
            for at, picture in enumerate(of_prompt)
        }
        self._tracker.log(images, step=samples_seen)

    def sync(self) -> None:
        """Nothing: the services write for themselves."""

    def close(self) -> None:
        """Send what is left."""
        self._safely(self._tracker.finish)

    def _safely(self, act: Callable[[], Any]) -> None:
        if not self._is_on:
            return
        try:
            with _talk():
                act()
        except Exception as error:  # hours of training weigh more than a curve
            self._is_on = False
            warn(f"[tracking] {self.service} is left alone from here on: {error!r}")


def _opened(service: str, recipe: TrainRecipe, folder: Path, name: str, before: str | None) -> Any:
    from accelerate import PartialState, tracking

    PartialState()  # the trackers' own log lines insist on it
    project = recipe.tracking.project or DEFAULT_PROJECT
    tracker: Any
    if service == "wandb":
        import wandb

        settings = wandb.Settings(console="off", disable_git=True, save_code=False)
        resumed = {"id": before, "resume": "allow"} if before else {}
        tracker = tracking.WandBTracker(
            project, name=name, dir=str(folder), settings=settings, **resumed
        )
    else:
        import trackio

        takes = inspect.signature(trackio.init).parameters
        quiet = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        more = {key: value for key, value in quiet.items() if key in takes}
        tracker = tracking.TrackioTracker(
            project, name=before or name, resume="allow" if before else "never", **more
        )
    tracker.start()
    return tracker


def _talk() -> AbstractContextManager[Any]:
    """What a service prints goes to stderr: stdout is for data."""
    return redirect_stdout(sys.stderr)


def _read(file: Path) -> dict[str, str]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
