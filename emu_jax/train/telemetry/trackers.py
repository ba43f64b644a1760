"""Opens the trackers of a run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import jax

from emu_jax.errors import UserError
from emu_jax.train.config import TrainConfig
from emu_jax.train.telemetry.files import JsonlTracker, TensorBoardTracker
from emu_jax.train.telemetry.tracker import BackgroundTracker, Tracker, Trackers
from emu_jax.train.telemetry.wandb_tracker import WandbTracker

# A value of `TrainConfig.tracker`, which is also the name of the package, to (the service's name
# in messages, its tracker).
SERVICES: dict[str, tuple[str, Callable[[TrainConfig, Path], Tracker]]] = {
    "wandb": ("Weights & Biases", WandbTracker),
}


def open_trackers(cfg: TrainConfig, workdir: Path, start_step: int | None = None) -> Trackers:
    """Returns the trackers of a run's stage: none on processes other than the first.

    Args:
        workdir: the run directory, created when there is something to record.
        start_step: steps done before this process began. Records of later steps, of an earlier
            process, are dropped. By default, the steps before the first record.

    Raises:
        UserError: the package of the tracker is not installed.
    """
    check_tracker(cfg)
    if jax.process_index() != 0:
        return Trackers(())
    # TensorBoard comes last: its import takes seconds, and a row has the time of its writing.
    return Trackers(
        (
            *_open_service(cfg, workdir),
            JsonlTracker(workdir, cfg.name, start_step),
            TensorBoardTracker(workdir, cfg.name, start_step),
        )
    )


def check_tracker(cfg: TrainConfig) -> None:
    """Checks that the tracker of a run can be opened.

    Raises:
        UserError: its package is not installed.
    """
    if cfg.tracker and importlib.util.find_spec(cfg.tracker) is None:
        raise UserError(
            f"tracker {cfg.tracker!r} is not installed: pip install 'emu_jax[{cfg.tracker}]'"
        )


def _open_service(cfg: TrainConfig, workdir: Path) -> tuple[Tracker, ...]:
    """Returns the tracker that `cfg.tracker` names, or none."""
    if not cfg.tracker:
        return ()
    name, tracker = SERVICES[cfg.tracker]
    return (BackgroundTracker(name, lambda: tracker(cfg, workdir)),)
