"""metrics.jsonl, event files and progress lines; a run that goes on leaves no duplicate."""

import io
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from emu_jax import progress
from emu_jax.errors import UserError
from emu_jax.train.config import TrainConfig
from emu_jax.train.telemetry import metrics
from emu_jax.train.telemetry.metrics import MetricLogger, read_metrics, series
from emu_jax.train.telemetry.trackers import open_trackers


def record(workdir, steps, *, stage="emu", value=float, start_step=None, **kwargs):
    with (
        open_trackers(TrainConfig(name=stage), workdir, start_step) as trackers,
        MetricLogger(trackers, stage=stage, total_steps=100, **kwargs) as logger,
    ):
        for step in steps:
            logger.log(step, {"loss": value(step)})


def steps_of(workdir, stage="emu"):
    return [row["step"] for row in read_metrics(workdir)[stage]]


def events_in(folder):
    """The events of every file in a folder, oldest file first (TFRecord framing)."""
    for path in sorted(folder.glob("*tfevents*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_rows_come_back(tmp_path):
    with open_trackers(TrainConfig(), tmp_path / "new" / "run") as trackers:
        logger = MetricLogger(trackers, stage="emu", total_steps=3)
        logger.log(1, {"loss": 0.1, "text_loss": 2.0})
        logger.log(3, {"loss": math.inf})
    (rows,) = read_metrics(tmp_path / "new" / "run").values()
    assert [(r["stage"], r["step"]) for r in rows] == [("emu", 1), ("emu", 3)]
    assert rows[0]["loss"] == 0.1 and math.isnan(rows[1]["loss"])
    assert "steps_per_second" not in rows[0] and rows[1]["steps_per_second"] > 0
    for line in (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    steps, values = series(rows, "text_loss")
    np.testing.assert_array_equal(steps, [1])
    np.testing.assert_array_equal(values, [2.0])


def test_each_row_is_on_disk_at_once(tmp_path):
    trackers = open_trackers(TrainConfig(), tmp_path)
    logger = MetricLogger(trackers, stage="emu", total_steps=3)
    logger.log(1, {"loss": 1.0})
    assert steps_of(tmp_path) == [1]
    for _ in range(2):
        logger.close()
        trackers.close()


def test_going_on_drops_what_lies_beyond_the_checkpoint(tmp_path):
    record(tmp_path, range(1, 8), stage="other")
    record(tmp_path, [1, 10, 20, 30, 35])
    record(tmp_path, [30, 40], start_step=20, value=lambda step: -float(step))
    assert steps_of(tmp_path) == [1, 10, 20, 30, 40]
    assert read_metrics(tmp_path)["emu"][3]["loss"] == -30.0  # the later run's
    assert steps_of(tmp_path, "other") == [1, 2, 3, 4, 5, 6, 7]
    # Without being told the checkpoint, the first row cuts.
    record(tmp_path, [40, 50])
    assert steps_of(tmp_path) == [1, 10, 20, 30, 40, 50]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_torn_last_line_is_dropped_and_others_are_errors(tmp_path):
    record(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"stage": "emu", "st')
    assert steps_of(tmp_path) == [1, 2]
    record(tmp_path, [3])
    assert steps_of(tmp_path) == [1, 2, 3]
    path.write_text("x" + whole)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        "[]",
        "3",
        '"x"',
        "{}",
        '{"stage": "emu"}',
        '{"step": 1}',
        '{"stage": 3, "step": 1}',
        '{"stage": "emu", "step": "1"}',
        '{"stage": "emu", "step": -1}',
        '{"stage": "emu", "step": 1, "loss": "low"}',
        '{"stage": "emu", "step": 1, "loss": [1]}',
        "[" * 100_000,
        "\udcff{}",
    ],
)
def test_an_odd_row_is_one_clear_line(row, tmp_path):
    record(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(row.encode(errors="surrogateescape") + b"\n" + path.read_bytes())
    for use in (lambda: read_metrics(tmp_path), lambda: record(tmp_path, [3])):
        with pytest.raises(UserError, match=r"metrics\.jsonl, line 1: not .*: fix or delete"):
            use()


def test_no_metrics_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="metrics.jsonl does not exist"):
        read_metrics(tmp_path)


def test_event_files_hold_the_scalars_and_purge_on_going_on(tmp_path):
    record(tmp_path, [1, 10, 20])
    record(tmp_path, [11], start_step=10)
    events = list(events_in(tmp_path / "tensorboard" / "emu"))
    scalars = [
        (e.step, v.tag, v.simple_value) for e in events for v in e.summary.value if v.tag == "loss"
    ]
    assert scalars == [(1, "loss", 1.0), (10, "loss", 10.0), (20, "loss", 20.0), (11, "loss", 11.0)]
    assert [e.step for e in events if e.HasField("session_log")] == [11]


def test_disabled_writes_nothing(tmp_path, capsys):
    record(tmp_path / "run", [1, 2], enabled=False)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().err == ""


def test_plain_progress_is_sparse_and_ends_with_the_last_row(tmp_path, capsys, monkeypatch):
    wall = iter(range(9000, 0, -100))  # a clock that is set back again and again
    for module in (metrics, progress):
        ticks = iter(range(1000, 2000, 4))  # a row every four seconds
        fake = SimpleNamespace(
            monotonic=lambda ticks=ticks: float(next(ticks)),
            time=lambda: float(next(wall)),
            time_ns=lambda: 0,
        )
        monkeypatch.setattr(module, "time", fake)
    with (
        open_trackers(TrainConfig(), tmp_path) as trackers,
        MetricLogger(trackers, stage="emu", total_steps=1000) as logger,
    ):
        for step in range(10, 90, 10):
            logger.log(step, {"loss": 0.5, "text_loss": 0.25, "grad_norm": 7.0})
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    shown = [int(line.split("step ")[1].split("/")[0]) for line in lines]
    assert shown == [10, 40, 70, 80]
    assert lines[0] == "emu: step 10/1000, loss 0.5, text_loss 0.25"
    assert lines[-1] == "emu: step 80/1000, loss 0.5, text_loss 0.25, 2.50 steps/s, 6m08s left"
    rates = [row["steps_per_second"] for row in read_metrics(tmp_path)["emu"][1:]]
    assert rates == [2.5] * 7


def test_bar_on_a_terminal(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "120")
    record(tmp_path, [1, 60, 100])
    shown = sys.stderr.getvalue()
    assert "emu" in shown and "100/100" in shown and "loss=100" in shown
