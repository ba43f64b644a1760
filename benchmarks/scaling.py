"""Step time and tokens a second over 1 to N devices and hosts, beside what `plan` predicted.

Weak scaling gives every device the same rows; strong scaling shares the rows of all devices out
over fewer. Each number of devices takes its steps by itself, since the states of all would not
fit side by side: `turns` steps after one that is not counted. Efficiency is tokens a second of a
device over those of the curve's fewest devices.

With `--set scaling.sweep=OUT/sweep.json`, what `emu-jax plan --sweep --out OUT` kept, the curves
of this kind of chip are drawn behind the measured points. A CPU has no entry in
`emu_jax/hardware.py` and no prediction. Its devices are threads of one process, which try the
mechanism rather than measure hardware: one of them computes with all cores. More devices than are
used, since the collectives wait in threads that devices share, and lock each other out of few:

    XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false" \\
        emu-jax bench scaling --set scaling.devices=2

Several hosts: the same command on each, with the variables that `emu-jax train` has there
(docs/launch.md); the first one writes. Settings: `config`, `rows` of a device, `tokens` and
`pictures` of a row, `dtype`, `remat`, `turns`, `devices` (0: all).
"""

import gc
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from emu_jax import bench
from emu_jax.config import UserError
from emu_jax.hardware import chip_name
from emu_jax.train.config import TrainConfig
from emu_jax.train.flops import train_flops
from emu_jax.train.loop import initialize_distributed

log = logging.getLogger("emu_jax")
step = bench.load("train_step")

PREDICTED = ("topology", "slices", "chips", "curve", "tokens_per_second",
             "tokens_per_second_overlap", "rows_per_chip")  # fmt: skip


def run(
    config: str = "emu_100m", rows: int = 1, tokens: int = 512, pictures: int = 4,
    dtype: str = "", remat: str = "dots", turns: int = 5, devices: int = 0, sweep: str = "",
) -> dict:  # fmt: skip
    initialize_distributed()
    kind = jax.devices()[0].device_kind
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    most = devices or len(jax.devices())
    if not 1 <= most <= len(jax.devices()) or turns < 1:
        raise UserError(
            f"scaling.devices is {most} and scaling.turns {turns}: at least 1, and here are "
            f"{len(jax.devices())} devices"
        )

    def cfg(rows: int) -> TrainConfig:
        return step.settings(config, rows, tokens, pictures, dtype, remat)

    row_flops = train_flops(cfg(1)).total
    predicted = predictions(Path(sweep), chip_name(kind), row_flops) if sweep else []
    points = measure(cfg, counts(most), rows, turns)
    return {
        "config": config, "dtype": dtype, "device": kind, "hosts": jax.process_count(),
        "row_tokens": tokens, "row_pictures": pictures, "remat": remat,
        "points": points, "predicted": predicted,
    }  # fmt: skip


def counts(most: int) -> list[int]:
    """Powers of two, and all."""
    return sorted({2**n for n in range(most.bit_length()) if 2**n <= most} | {most})


def measure(cfg: Any, numbers: list[int], rows: int, turns: int) -> list[dict]:
    """A point for each number of devices, weak and strong; `cfg` of a number of rows."""
    points = []
    for devices in numbers:
        for curve, batch in (("weak", rows * devices), ("strong", rows * numbers[-1])):
            if batch % devices:
                continue  # rows that do not share out
            same = [p for p in points if (p["devices"], p["rows"]) == (devices, batch)]
            seconds = same[0]["seconds"] if same else steps(cfg(batch), devices, turns)
            used = jax.devices()[:devices]
            points.append({
                "curve": curve, "devices": devices,
                "hosts": len({device.process_index for device in used}), "rows": batch,
                "seconds": seconds,
            })  # fmt: skip
            log.info("%s, %d devices, %d rows: %s s", curve, devices, batch, bench.shown(seconds))
    one: dict[str, float] = {}  # tokens a second of one device, by curve
    for point in points:
        rate = point["rows"] * cfg(1).data.row_tokens / point["seconds"]["median"]
        one.setdefault(point["curve"], rate)
        point["tokens_per_second"] = round(rate, 1)
        point["efficiency"] = round(rate / point["devices"] / one[point["curve"]], 4)
    return points


def steps(cfg: TrainConfig, devices: int, turns: int) -> dict[str, float]:
    """Seconds of a step on the first `devices`, as the first process has them, which has one in
    any case; a process that has none waits."""
    taken = [0.0] * turns
    if jax.process_index() in {d.process_index for d in jax.devices()[:devices]}:
        ours = step.Ours(cfg, step.documents(cfg), devices)
        ours.step()
        taken = []
        for _ in range(turns):
            began = time.perf_counter()
            ours.step()
            taken.append(time.perf_counter() - began)
        del ours
        gc.collect()
    return bench.median(multihost_utils.broadcast_one_to_all(np.array(taken)).tolist())


def predictions(path: Path, chip: str, row_flops: float) -> list[dict]:
    """The curves of `chip` in a sweep, of a model whose step takes `row_flops` for a row.

    Raises:
        UserError: the file cannot be read, or has none.
    """
    try:
        reports = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--set scaling.sweep={path}: {error}") from None
    found = [
        {key: report[key] for key in PREDICTED}
        for report in reports
        if report.get("fits")
        and report.get("curve")
        and report["topology"].startswith(f"{chip}:")
        and math.isclose(report["model_flops"] / report["rows"], row_flops, rel_tol=1e-6)
    ]
    if not chip or not found:
        raise UserError(
            f"--set scaling.sweep={path}: no curve of {chip or 'this device'} for this model and "
            "size of a row is in it"
        )
    return found


def table(figures: dict) -> str:
    head = ("Scaling", "Devices", "Hosts", "Rows", "Step, s", "Tokens/s", "Efficiency")
    keys = ("curve", "devices", "hosts", "rows", "seconds", "tokens_per_second", "efficiency")
    rows = [[point[key] for key in keys] for point in figures["points"]]
    about = (
        f"`{figures['config']}`, {figures['dtype']}, rows of {figures['row_tokens']:,} tokens with "
        f"{figures['row_pictures']} pictures, on {figures['device']} devices."
    )
    if not figures["predicted"]:
        about += " No prediction: no sweep of `emu-jax plan` for these devices was given."
    return bench.markdown(head, rows) + "\n\n" + about


def plot(figures: dict, path: Path) -> None:
    """Tokens a second and efficiency over devices; bands are between `plan`'s bounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels: Any = figure.subplots(1, 2)
    for n, curve in enumerate(("weak", "strong")):
        style = {"color": f"C{n}", "label": f"{curve}, measured", "marker": "o"}
        points = [p for p in figures["points"] if p["curve"] == curve]
        for panel, key in zip(panels, ("tokens_per_second", "efficiency"), strict=True):
            panel.plot([p["devices"] for p in points], [p[key] for p in points], **style)
        found = sorted(
            (p for p in figures["predicted"] if p["curve"] == curve), key=lambda p: p["chips"]
        )
        if not found:
            continue
        chips = [p["chips"] for p in found]
        low, high = (
            [p[key] for p in found] for key in ("tokens_per_second", "tokens_per_second_overlap")
        )
        band = {"color": f"C{n}", "alpha": 0.15, "label": f"{curve}, plan"}
        panels[0].fill_between(chips, low, high, **band)
        per_chip = [[v / c for v, c in zip(values, chips, strict=True)] for values in (low, high)]
        panels[1].fill_between(chips, *([v / values[0] for v in values] for values in per_chip),
                               **band)  # fmt: skip
    ideal = [p for p in figures["points"] if p["curve"] == "weak"]
    panels[0].plot(
        [p["devices"] for p in ideal],
        [ideal[0]["tokens_per_second"] * p["devices"] for p in ideal],
        color="grey", linewidth=0.8, linestyle=":", label="in proportion",
    )  # fmt: skip
    numbers = sorted({p["devices"] for p in figures["points"]})
    for panel, title in zip(panels, ("tokens per second", "efficiency"), strict=True):
        panel.set(xscale="log", xlabel="devices", title=title)
        if not figures["predicted"]:
            panel.set_xticks(numbers, map(str, numbers))
            panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[1].set_ylim(bottom=0)
    panels[0].legend(fontsize=8)
    temporary = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(temporary, dpi=130)
    temporary.rename(path)
