"""Records of a run: event files, Weights & Biases, loss spikes; a broken service costs no step."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import UNOPTIMIZED
from PIL import Image
from test_metrics import events_in
from wandb_files import history, records

from emu_jax.errors import UserError
from emu_jax.train.config import TrainConfig
from emu_jax.train.telemetry import tracker as tracker_module
from emu_jax.train.telemetry import trackers as trackers_module
from emu_jax.train.telemetry import wandb_tracker
from emu_jax.train.telemetry.spikes import SpikeDetector
from emu_jax.train.telemetry.tracker import BackgroundTracker, Tracker
from emu_jax.train.telemetry.trackers import open_trackers
from emu_jax.train.telemetry.wandb_tracker import WandbTracker

SHEET = Image.new("RGB", (12, 8), (250, 10, 10))


def test_tensorboard_has_evaluations_images_and_tables(tmp_path):
    with open_trackers(TrainConfig(name="toy"), tmp_path) as trackers:
        trackers.metrics(2, {"loss": 0.5}, "heldout")
        trackers.images(2, "heldout/sheet", SHEET, "seven")
        trackers.table(2, "heldout/table", ["source", "loss"], [["all", 0.5], ["b", None]])
    values = {
        v.tag: v for e in events_in(tmp_path / "tensorboard" / "toy") for v in e.summary.value
    }
    assert values["heldout/loss"].simple_value == 0.5
    image = values["heldout/sheet"]
    assert (image.image.width, image.image.height) == (12, 8)
    assert image.image.encoded_image_string.startswith(b"\x89PNG")
    assert image.metadata.summary_description == "seven"
    (table,) = (v for tag, v in values.items() if tag.startswith("heldout/table"))
    assert table.tensor.string_val[0].decode().splitlines()[2:] == ["| all | 0.5 |", "| b |  |"]
    assert not (tmp_path / "metrics.jsonl").exists()  # which has the metrics of training alone


class Service(Tracker):
    """A tracker that remembers its calls, of which some fail or hang."""

    def __init__(self, hangs: threading.Event | None = None):
        self.steps, self.closed, self.hangs = [], [], hangs

    def metrics(self, step, values, evaluation=""):
        if self.hangs is not None:
            self.hangs.wait()
        if step % 2:
            raise ConnectionError("the service\nis away")
        self.steps.append(step)

    def close(self, failed=False):
        self.closed.append(failed)


def test_a_broken_service_costs_its_records_alone(capsys, monkeypatch):
    service = Service()
    background = BackgroundTracker("Service", lambda: service)
    for step in range(1, 8):
        background.metrics(step, {})
    background.sync()
    assert service.steps == [2, 4, 6]
    background.close(failed=True)
    assert service.closed == [True] and background.lost == 4
    assert capsys.readouterr().err.splitlines() == [
        "Service: the service: training continues without it",
        "Service: 4 records were lost; the run directory has all of them",
    ]

    def refused():
        raise PermissionError("no key")

    background = BackgroundTracker("Service", refused)
    background.metrics(1, {})
    background.sync()
    background.close()
    assert background.lost == 1 and "Service: no key:" in capsys.readouterr().err

    # One that hangs delays a checkpoint once, the end no longer than promised, and fills no memory.
    monkeypatch.setattr(tracker_module, "_CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(tracker_module, "_SYNC_SECONDS", 0.2)
    hangs = threading.Event()
    background = BackgroundTracker("Service", lambda: Service(hangs))
    background.metrics(0, {})
    began = time.monotonic()
    for _ in range(20):
        background.sync()
    assert 0.2 <= time.monotonic() - began < 3
    monkeypatch.setattr(tracker_module, "_QUEUED", 3)
    background = BackgroundTracker("Service", lambda: Service(hangs))
    for step in range(9):
        background.metrics(step, {})
    background.close()
    assert background.lost >= 5
    assert "records are still in transit" in capsys.readouterr().err
    hangs.set()


class Wandb(SimpleNamespace):
    """The parts of the package that the tracker uses."""

    def __init__(self, first_step: int = 0):
        super().__init__(logged=[], started=[], Image=lambda image, caption: image)
        self.Settings = lambda **settings: settings
        self.Settings.model_fields = {"console": None, "finish_timeout": None}
        self.run = SimpleNamespace(
            config=SimpleNamespace(update=lambda config, allow_val_change: None),
            define_metric=lambda *_, **__: None,
            log=lambda values, step, commit: self.logged.append((step, values)),
            finish=lambda exit_code: None,
            step=first_step,
            offline=True,
        )

    def init(self, **settings):
        state = json.loads((Path(settings["dir"]) / "wandb.json").read_text())
        assert state["id"] == settings["id"]  # so that a run that is killed now is found again
        self.started.append(settings)
        return self.run


def test_a_run_that_resumes_repeats_no_record(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_tracker, "_WRITTEN_SECONDS", 0.0)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    cfg = TrainConfig(name="toy", tracker="wandb")

    def start(first_step: int) -> tuple[Wandb, WandbTracker]:
        wandb = Wandb(first_step)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        return wandb, WandbTracker(cfg, tmp_path)

    before, tracker = start(0)
    for step in range(1, 8):
        tracker.metrics(step, {"loss": 1.0})
        if step == 4:
            tracker.metrics(4, {"loss": 2.0}, "heldout")
            tracker.images(4, "heldout/sheet", SHEET)
    # Killed; resumes from step 4, where an evaluation was due that a signal prevented.
    after, tracker = start(0)
    tracker.metrics(4, {"loss": 3.0}, "other")
    for step in range(5, 10):
        tracker.metrics(step, {"loss": 1.0})
        if step == 8:
            tracker.metrics(8, {"loss": 2.0}, "heldout")
            tracker.images(8, "heldout/sheet", SHEET)
    logged = before.logged + after.logged
    steps = [step for step, _ in logged]
    assert all(a < b for a, b in zip(steps, steps[1:], strict=False))
    of = lambda name: [values["step"] for _, values in logged if name in values]  # noqa: E731
    assert of("loss") == list(range(1, 10))
    assert of("heldout/loss") == of("heldout/sheet") == [4, 8] and of("other/loss") == [4]
    (first,), (second,) = before.started, after.started
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert first["settings"].keys() == {"console", "finish_timeout"}
    # The server may know of records that wandb.json does not.
    server, tracker = start(100)
    tracker.metrics(10, {"loss": 1.0})
    assert server.logged[0][0] == 100


def test_a_tracker_must_be_known_and_installed(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"unknown tracker 'wandv'; did you mean 'wandb'\?"):
        TrainConfig(tracker="wandv")
    monkeypatch.setattr(trackers_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"'wandb' is not installed: pip install 'emu_jax\[wandb\]'"
    ):
        open_trackers(TrainConfig(tracker="wandb"), tmp_path)


def test_a_planted_spike_is_recorded_with_its_documents(tmp_path, capsys):
    rng = np.random.default_rng(0)
    path = tmp_path / "spikes-0.jsonl"
    rows = lambda: [json.loads(line) for line in path.read_text().splitlines()]  # noqa: E731
    where = lambda source, index: f"{source}.tar:{index}"  # noqa: E731
    with SpikeDetector(tmp_path, 8.0) as spikes:
        for step in range(1, 301):
            spikes.remember(step, [("web", step), ("web", -step)])
            if step > 1:  # a step is in flight
                loss = 5.0 * 0.998 ** (step - 1) + 0.1 * rng.normal()
                spikes.check(step - 1, loss + 3 * (step - 1 == 200), True, where)
    (row,) = rows()
    assert row["step"] == 200 and row["documents"] == [["web", 200], ["web", -200]]
    assert row["where"][1] == "web.tar:-200" and row["median"] < row["limit"] < row["loss"]
    assert len(spikes._documents) <= 16
    assert "loss spike at step 200" in capsys.readouterr().err
    # A run that resumes comes to that step again, then to another spike.
    with SpikeDetector(tmp_path, 8.0) as spikes:
        for step in (200, 210):
            spikes.remember(step, [("web", 1)])
            spikes.check(step, float("nan"), False, where)
    assert rows()[0] == row and [row["step"] for row in rows()] == [200, 210]
    assert rows()[1]["loss"] is None
    with SpikeDetector(tmp_path / "none", 0.0) as spikes:
        spikes.check(1, float("nan"), False, where)
    assert not (tmp_path / "none").exists()


COMMAND = """
import dataclasses, os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_train
from PIL import Image
from emu_jax.train import loop, run
from emu_jax.train.config import EvalConfig
from emu_jax.train.telemetry.tracker import Trackers

opened = run.open_trackers

class Drawing(Trackers):
    def metrics(self, step, values, evaluation=""):
        super().metrics(step, values, evaluation)
        if evaluation:
            self.images(step, "heldout/sheet", Image.new("RGB", (8, 8)), f"after {{step}} steps")
        elif step == {kill}:
            os.kill(os.getpid(), signal.SIGKILL)

run.open_trackers = lambda *args: Drawing([opened(*args)])
evaluations = (EvalConfig("heldout", every=2, batches=1),)
cfg = test_train.small("clip", {root!r}, steps={steps}, tracker="wandb", eval=evaluations)
loop.train(cfg, Path({workdir!r}))
"""


@pytest.mark.slow
def test_a_killed_run_of_the_digits_is_one_wandb_run(tmp_path, copy_digits):
    pytest.importorskip("wandb")
    copy_digits(tmp_path / "digits")
    workdir, steps = tmp_path / "run", 10
    environment = os.environ | {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(workdir),
        "XLA_FLAGS": f"{UNOPTIMIZED} --xla_force_host_platform_device_count=1",
    }
    for kill, status in ((7, -signal.SIGKILL), (0, 0)):
        code = COMMAND.format(
            tests=str(Path(__file__).parent),
            root=str(tmp_path / "digits"),
            kill=kill,
            steps=steps,
            workdir=str(workdir),
        )
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
        assert done.returncode == status, done.stderr.decode()
    files = sorted(workdir.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    (name,) = {r.run.run_id for f in files for r in records(f) if r.HasField("run")}
    assert name == json.loads((workdir / "wandb.json").read_text())["id"]
    before, after = map(history, files)
    rows = before + after
    own = [row["_step"] for row in rows]
    assert own == sorted(set(own))
    # No step is lost. What was logged in the last moments before the kill may be there twice.
    of = lambda rows, name: [row["step"] for row in rows if name in row]  # noqa: E731
    assert sorted(set(of(rows, "loss"))) == list(range(1, steps + 1))
    assert of(before, "loss") == list(range(1, len(of(before, "loss")) + 1))
    assert of(after, "loss")[0] > 4  # those before the checkpoint of step 6 were in its log
    assert of(after, "loss") == list(range(of(after, "loss")[0], steps + 1))
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in logged}
    assert all(row["loss"] == pytest.approx(losses[row["step"]]) for row in rows if "loss" in row)
    sheets = {row["step"]: row for row in rows if "heldout/sheet.path" in row}
    assert sheets.keys() == set(range(2, steps + 1, 2))
    for step, row in sheets.items():
        assert row["heldout/sheet.caption"] == f"after {step} steps"
        assert list(workdir.glob(f"wandb/offline-run-*/files/{row['heldout/sheet.path']}"))
    configs = {i.key: json.loads(i.value_json) for r in records(files[-1]) for i in r.config.update}
    assert configs["checkpoint_every"] == 2 and len(configs["git_revision"]) >= 40
