"""Weights & Biases."""

from __future__ import annotations

import collections
import json
import math
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from PIL import Image

from emu_jax.config import to_dict
from emu_jax.storage import is_remote, read_json_object, write_text
from emu_jax.train.config import TrainConfig
from emu_jax.train.telemetry.tracker import Cell, Tracker

STATE_FILE = "wandb.json"
_CONNECT_SECONDS = 60.0
_UPLOAD_SECONDS = 45.0  # at the end of a run
_FLUSH_SECONDS = 0.1  # how often W&B's client writes its log
_WRITTEN_SECONDS = 0.3  # after which a record is in the log
_GIT_SECONDS = 10.0


class _Sent(NamedTuple):
    """A record that W&B's client has, and may not have written to its log yet."""

    at: float  # time.monotonic
    kind: str
    step: int


class WandbTracker(Tracker):
    """Sends the records of a run to Weights & Biases, or, offline, to files for `wandb sync`.

    A run that resumes continues the same W&B run. DIR/wandb.json holds the id, written before W&B
    hears of it, and the last step that was sent of each kind of record. W&B cannot take a step
    back, so records of steps that a resumed run repeats are not sent again. Those of the last
    moments before the process was killed are: W&B's client may have lost them.

    The x axis is the metric `step`. W&B's own step is the number of the training step too, or the
    next free one, because it must grow with every record.

    Raises:
        UserError: wandb.json is damaged.
        wandb.Error: W&B refuses the run, or cannot be reached.
    """

    def __init__(self, cfg: TrainConfig, workdir: Path) -> None:
        import wandb

        self._wandb = wandb
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / STATE_FILE
        state = read_json_object(self._path) if self._path.exists() else {}
        self._id: str = state.get("id") or secrets.token_hex(4)
        self._sent: dict[str, int] = dict(state.get("sent", {}))
        self._repeated = dict(self._sent)
        self._recent: collections.deque[_Sent] = collections.deque()
        self._last: int = state.get("last", -1)  # step of W&B's own of the last record
        self._save()  # before W&B hears of the id
        settings = {
            "console": "off",
            "silent": True,
            "init_timeout": _CONNECT_SECONDS,
            "login_timeout": 1.0,  # never wait for a key on a terminal
            "finish_timeout": _UPLOAD_SECONDS,
            "x_transaction_log_flush_interval": _FLUSH_SECONDS,
        }
        known = wandb.Settings.model_fields.keys()  # older versions lack the last two
        self._run = wandb.init(
            project=cfg.wandb.project,
            entity=cfg.wandb.entity or None,
            name=cfg.wandb.run_name or cfg.name,
            tags=cfg.wandb.tags,
            id=self._id,
            resume="allow",
            dir=None if "WANDB_DIR" in os.environ else _local_folder(workdir),
            settings=wandb.Settings(**{k: v for k, v in settings.items() if k in known}),
        )
        about = {
            "git_revision": git_revision(),
            "jax": jax.__version__,
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "processes": jax.process_count(),
        }
        self._run.config.update(to_dict(cfg) | about, allow_val_change=True)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        # A process that was killed may have sent one record that wandb.json does not know of.
        self._last = max(self._last + bool(state), self._run.step - 1)
        if not self._run.offline:
            print(f"Weights & Biases: {self._run.url}", file=sys.stderr, flush=True)

    def metrics(self, step: int, values: Mapping[str, float], evaluation: str = "") -> None:
        """Sends metrics, those of an evaluation as `EVALUATION/NAME`."""
        prefix = f"{evaluation}/" if evaluation else ""
        self._log(step, f"metrics {evaluation}", {prefix + k: v for k, v in values.items()})

    def images(self, step: int, name: str, image: Image.Image, caption: str = "") -> None:
        """Sends an image."""
        media = self._wandb.Image(image, caption=caption or None)
        self._log(step, f"images {name}", {name: media})

    def table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]
    ) -> None:
        """Sends a table."""
        table = self._wandb.Table(
            columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True
        )
        self._log(step, f"table {name}", {name: table})

    def sync(self) -> None:
        """Waits until W&B's client has written the records so far to its log."""
        if self._recent:
            time.sleep(_WRITTEN_SECONDS)
        self._save()

    def close(self, failed: bool = False) -> None:
        """Ends the run, and waits a bounded time for its upload."""
        self._run.finish(exit_code=int(failed))
        self._save(written=True)

    def _log(self, step: int, kind: str, values: dict[str, Any]) -> None:
        if step <= self._repeated.get(kind, -1):
            return
        self._last = max(step, self._last + 1)
        self._run.log({"step": step} | values, step=self._last, commit=True)
        self._recent.append(_Sent(time.monotonic(), kind, step))
        self._save()

    def _save(self, *, written: bool = False) -> None:
        """Writes wandb.json, with the records that W&B's client has had time to write.

        Args:
            written: whether it has written all of them.
        """
        before = math.inf if written else time.monotonic() - _WRITTEN_SECONDS
        while self._recent and self._recent[0].at <= before:
            sent = self._recent.popleft()
            self._sent[sent.kind] = sent.step
        state = {"id": self._id, "last": self._last, "sent": self._sent}
        write_text(self._path, json.dumps(state, indent=2) + "\n")


def _local_folder(workdir: Path) -> str:
    """Returns where W&B keeps its files: the run directory, if that is local."""
    return tempfile.gettempdir() if is_remote(workdir) else str(workdir)


def git_revision() -> str:
    """Returns the commit of the clone that the package is in, with -dirty if files differ from
    it; "" outside a clone."""
    package = Path(__file__).parents[2]
    if not (package.parent / "pyproject.toml").is_file():
        return ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=package, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
