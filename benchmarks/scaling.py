"""Step time and tokens per second on 1 to N devices and hosts, next to the prediction of `plan`.

Weak scaling gives every device the same number of rows. Strong scaling divides a fixed number of
rows over the devices. Each number of devices is measured on its own, because their states would
not fit together: `turns` steps after one that is not counted. Efficiency is tokens per second and
device, relative to the fewest devices of the curve.

`--set scaling.sweep=OUT/sweep.json` reads the reports of `emu-jax plan --sweep --out OUT` and
shows the curves for this kind of chip and the same model, rows and remat next to the
measurements. CPUs are not in `emu_jax/hardware.py` and have no prediction. Their devices are
threads, which exercise the mechanism rather than measure hardware. If there is only one, a
process with `CPU_FLAGS` measures.

On several hosts run the same command on each, with the variables of `emu-jax train`
(docs/launch.md); the first host writes. Settings: `config`, `rows` per device, `tokens` and
`images` per row, `dtype`, `remat`, `turns`, and `least` to `devices` (0: all), the
range of devices. A setting that does not fit in memory is skipped with a line.
"""

import gc
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from emu_jax import bench
from emu_jax.errors import UserError
from emu_jax.hardware import chip_name
from emu_jax.storage import writing
from emu_jax.train.config import TrainConfig
from emu_jax.train.flops import train_flops

log = logging.getLogger("emu_jax")
step = bench.load_benchmark("train_step")

PREDICTED = (
    "topology",
    "slices",
    "devices",
    "curve",
    "rows",
    "tokens_per_second",
    "tokens_per_second_overlap",
)

# Eight devices, of which as many as there are cores are used. Collectives wait in threads that
# devices share, and with too few threads they deadlock. One device would compute with all cores.
CPU_FLAGS = "--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false"


def run(
    config: str = "emu_100m",
    rows: int = 1,
    tokens: int = 512,
    images: int = 4,
    dtype: str = "",
    remat: str = "dots",
    turns: int = 5,
    least: int = 1,
    devices: int = 0,
    sweep: str = "",
) -> dict:
    settings = dict(locals())
    if jax.default_backend() == "cpu" and len(jax.devices()) == 1 < bench.cores():
        return apart(settings | {"devices": devices or bench.cores()})
    kind = jax.devices()[0].device_kind
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    most = devices or len(jax.devices())
    if not 1 <= least <= most <= len(jax.devices()) or turns < 1 or rows < 1:
        raise UserError(
            f"scaling.least is {least}, devices {most}, rows {rows} and turns {turns}: each at "
            f"least 1, and here are {len(jax.devices())} devices"
        )

    def cfg(rows: int) -> TrainConfig:
        return step.settings(config, rows, tokens, images, dtype, remat)

    chip, row_flops = chip_name(kind), train_flops(cfg(1)).total
    predicted = predictions(Path(sweep), chip, row_flops, rows, most, remat) if sweep else []
    points = measure(cfg, counts(least, most), rows, turns)
    return {
        "config": config,
        "dtype": dtype,
        "device": kind,
        "hosts": jax.process_count(),
        "row_tokens": tokens,
        "row_images": images,
        "remat": remat,
        "points": points,
        "predicted": predicted,
    }


def apart(settings: dict[str, Any]) -> dict:
    """Runs the benchmark in a process with several CPU devices and returns its figures."""
    words = [f"--set=scaling.{key}={value}" for key, value in settings.items() if value != ""]
    flags = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), CPU_FLAGS]))
    command = [sys.executable, "-m", "emu_jax.cli", "bench", "scaling", *words, "--json"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, "--out", folder],
            env=os.environ | {"XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            text=True,
        )
    if done.returncode:
        raise UserError("scaling: the process with several CPU devices failed, as said above")
    return json.loads(done.stdout.splitlines()[-1])["scaling"] | {"flags": CPU_FLAGS}


def counts(least: int, most: int) -> list[int]:
    """Returns `least`, its doubles up to `most`, and `most`."""
    doubled = {least * 2**n for n in range(most.bit_length())}
    return sorted({n for n in doubled if n <= most} | {most})


def measure(cfg: Any, numbers: list[int], rows: int, turns: int) -> list[dict]:
    """Returns a point per curve and number of devices. `cfg` makes the config for a number of
    rows."""
    points = []
    for devices in numbers:
        for curve, batch in (("weak", rows * devices), ("strong", rows * numbers[-1])):
            if batch % devices:
                continue  # rows do not divide
            same = [p for p in points if (p["devices"], p["rows"]) == (devices, batch)]
            seconds = same[0]["seconds"] if same else steps(cfg(batch), devices, turns)
            if not seconds:
                log.info("%s, %d devices, %d rows: does not fit", curve, devices, batch)
                continue
            used = jax.devices()[:devices]
            points.append(
                {
                    "curve": curve,
                    "devices": devices,
                    "hosts": len({device.process_index for device in used}),
                    "rows": batch,
                    "seconds": seconds,
                }
            )
            log.info("%s, %d devices, %d rows: %s s", curve, devices, batch, bench.shown(seconds))
    if not points:
        raise UserError("scaling: nothing fits: raise scaling.least, or choose a smaller model")
    one: dict[str, float] = {}  # tokens per second and device at the fewest devices, by curve
    for point in points:
        rate = point["rows"] * cfg(1).data.row_tokens / point["seconds"]["median"]
        one.setdefault(point["curve"], rate / point["devices"])
        point["tokens_per_second"] = round(rate, 1)
        point["efficiency"] = round(rate / point["devices"] / one[point["curve"]], 4)
    return points


def steps(cfg: TrainConfig, devices: int, turns: int) -> dict[str, float] | None:
    """Returns the seconds of a step on the first `devices`, or None if the model does not fit. All
    processes get the figure of the first one, which always has a device; others may only wait."""
    taken = [0.0] * turns
    if jax.process_index() in {d.process_index for d in jax.devices()[:devices]}:
        try:
            taken = timed(cfg, devices, turns)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        gc.collect()
    everywhere = multihost_utils.broadcast_one_to_all(np.array(taken))
    return bench.median(everywhere.tolist()) if everywhere.all() else None


def timed(cfg: TrainConfig, devices: int, turns: int) -> list[float]:
    ours = step.Ours(cfg, step.documents(cfg), devices)
    ours.step()
    taken = []
    for _ in range(turns):
        began = time.perf_counter()
        ours.step()
        taken.append(time.perf_counter() - began)
    return taken


def predictions(
    path: Path, chip: str, row_flops: float, rows: int, most: int, remat: str
) -> list[dict]:
    """Returns the curves of `chip` in a sweep, for a model whose step takes `row_flops` per row:
    weak with `rows` per device, strong with the rows of `most` devices.

    Raises:
        UserError: the file cannot be read, or has no such curve.
    """
    try:
        reports = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--set scaling.sweep={path}: {error}") from None
    same = [
        report
        for report in reports
        if report.get("fits")
        and report.get("curve")
        and report["topology"].startswith(f"{chip}:")
        and math.isclose(report["model_flops"] / report["rows"], row_flops, rel_tol=1e-6)
    ]
    if not chip or not same:
        raise UserError(
            f"--set scaling.sweep={path}: no curve of {chip or 'this device'} for this model and "
            "size of a row is in it"
        )
    wanted = {"weak": lambda r: rows * r["devices"], "strong": lambda r: rows * most}
    found = [
        {key: report[key] for key in PREDICTED}
        for report in same
        if report["rows"] == wanted[report["curve"]](report) and report["remat"]["llama"] == remat
    ]
    if not found:
        held = sorted(
            {(r["rows"] / r["devices"], r["remat"]["llama"]) for r in same if r["curve"] == "weak"}
        )
        raise UserError(
            f"--set scaling.sweep={path}: no curve with {rows} rows a device and remat {remat}; "
            + " or ".join(f"rows={each:g}, remat={policy}" for each, policy in held)
        )
    return found


def table(figures: dict) -> str:
    head = ["Scaling", "Devices", "Hosts", "Rows", "Step, s", "Tokens/s", "Efficiency"]
    keys = ("curve", "devices", "hosts", "rows", "seconds", "tokens_per_second", "efficiency")
    rows = [[point[key] for key in keys] for point in figures["points"]]
    if plans := {(p["curve"], p["devices"]): p for p in figures["predicted"]}:
        head.append("Tokens/s, plan")
        for row, point in zip(rows, figures["points"], strict=True):
            plan = plans.get((point["curve"], point["devices"]))
            row.append(
                plan
                and " to ".join(
                    bench.shown(plan[key])
                    for key in ("tokens_per_second", "tokens_per_second_overlap")
                )
            )
    about = (
        f"`{figures['config']}`, {figures['dtype']}, rows of {figures['row_tokens']:,} tokens with "
        f"{figures['row_images']} images, on {figures['device']} devices."
    )
    if not figures["predicted"]:
        about += " No prediction: no sweep of `emu-jax plan` for these devices was given."
    if "flags" in figures:
        about += f" XLA_FLAGS: `{figures['flags']}`."
    return bench.markdown_table(head, rows) + "\n\n" + about


def plot(figures: dict, path: Path) -> None:
    """Plots tokens per second over devices, in total and per device. Bands lie between the bounds
    of `plan`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels: Any = figure.subplots(1, 2)
    for n, curve in enumerate(("weak", "strong")):
        style = {"color": f"C{n}", "label": f"{curve}, measured", "marker": "o"}
        points = [p for p in figures["points"] if p["curve"] == curve]
        found = sorted(
            (p for p in figures["predicted"] if p["curve"] == curve), key=lambda p: p["devices"]
        )
        band = {"color": f"C{n}", "alpha": 0.15, "label": f"{curve}, plan"}
        bounds = "tokens_per_second", "tokens_per_second_overlap"
        for panel, share in zip(panels, (lambda p: 1, lambda p: p["devices"]), strict=True):
            rates = [p["tokens_per_second"] / share(p) for p in points]
            panel.plot([p["devices"] for p in points], rates, **style)
            if found:
                low_high = ([p[bound] / share(p) for p in found] for bound in bounds)
                panel.fill_between([p["devices"] for p in found], *low_high, **band)
    ideal = [p for p in figures["points"] if p["curve"] == "weak"]
    panels[0].plot(
        [p["devices"] for p in ideal],
        [ideal[0]["tokens_per_second"] / ideal[0]["devices"] * p["devices"] for p in ideal],
        color="grey",
        linewidth=0.8,
        linestyle=":",
        label="ideal",
    )
    numbers = sorted({p["devices"] for p in figures["points"]})
    for panel, title in zip(
        panels, ("tokens per second", "tokens per second and device"), strict=True
    ):
        panel.set(xscale="log", xlabel="devices", title=title)
        if not figures["predicted"]:
            panel.set_xticks(numbers, map(str, numbers))
            panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[1].set_ylim(bottom=0)
    panels[0].legend(fontsize=8)
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
