"""Tries settings on topologies, keeps every report, and draws how the best of them scales.

OUT/sweep.json   every report; a sweep that was stopped goes on from it
OUT/sweep.md     the table
OUT/scaling.png  predicted tokens per second and MFU over chips
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from emu_jax.config import UserError, to_dict
from emu_jax.hardware import Topology
from emu_jax.plan.plan import CompilerCrash, Report, devices_of, plan_apart
from emu_jax.train.config import MeshConfig, TrainConfig
from emu_jax.train.loop import mesh_for

log = logging.getLogger(__name__)

# From most memory to least, so that the first that fits computes the least again.
POLICIES = ("dots", "minimal", "full")
ROWS_PER_CHIP = (8, 6, 4, 3, 2, 1)
# Slices along which a scaling curve is drawn, in chips; the last of 2D ones are several slices.
LADDERS: dict[int, tuple[tuple[str, int], ...]] = {
    2: (("4x4", 1), ("8x8", 1), ("8x16", 1), ("16x16", 1), ("16x16", 2)),
    3: (("2x2x4", 1), ("4x4x4", 1), ("4x4x8", 1), ("4x8x8", 1), ("8x8x8", 1), ("4x4x8", 4)),
}


def settings(cfg: TrainConfig, topology: Topology) -> Iterator[tuple[TrainConfig, ...]]:
    """Families of settings; of each the first that fits, and compiles, is the one to have."""
    widest = _ways(cfg, topology)
    for policy in POLICIES:
        for fsdp in (widest, widest // 2) if widest % 2 == 0 else (widest,):
            yield tuple(
                dataclasses.replace(
                    cfg,
                    data=dataclasses.replace(cfg.data, batch_size=rows * topology.chips),
                    mesh=MeshConfig(fsdp=fsdp, tensor=1),
                    remat=dataclasses.replace(cfg.remat, llama=policy),
                )
                for rows in ROWS_PER_CHIP
                if rows % topology.chip.devices == 0
            )


def _ways(cfg: TrainConfig, topology: Topology) -> int:
    wide = dataclasses.replace(cfg.data, batch_size=topology.chips * topology.chip.devices)
    free = dataclasses.replace(cfg, data=wide, mesh=MeshConfig(tensor=1))
    return mesh_for(free, devices_of(topology)).shape["fsdp"]


def sweep(pairs: Iterable[tuple[TrainConfig, Topology]], out: Path, *, scaling: bool) -> Report:
    """Plans every setting of every topology, then the scaling of the best one.

    Returns the best report of each topology, under its name.

    Raises:
        UserError: nothing fits a topology.
    """
    out.mkdir(parents=True, exist_ok=True)
    kept = _Kept(out / "sweep.json")
    best: dict[str, Report] = {}
    for cfg, topology in pairs:
        found = []
        for family in settings(cfg, topology):
            for candidate in family:
                report = kept.plan(candidate, topology)
                if report["fits"]:
                    found.append((report, candidate))
                    break
        if not found:
            raise UserError(f"no setting fits {topology}: take more chips, or a smaller model")
        report, chosen = min(found, key=lambda pair: seconds_per_row(pair[0]))
        best[_name(topology)] = report
        if scaling:
            _scale(kept, chosen, topology)
    table = markdown(kept.used)
    _write(out / "sweep.md", table)
    curves = [report for report in kept.used if report["curve"]]
    if curves:
        draw(curves, out / "scaling.png")
    return {"best": best, "reports": len(kept.used), "out": str(out)}


def _scale(kept: _Kept, chosen: TrainConfig, topology: Topology) -> None:
    """Weak scaling (rows per chip as chosen) and strong (rows as chosen) over slices."""
    per_chip = chosen.data.batch_size // topology.chips
    for shape, slices in LADDERS[topology.chip.torus_axes]:
        other = Topology.parse(f"{topology.chip_name}:{shape}", slices)
        for curve, rows in (("weak", per_chip * other.chips), ("strong", chosen.data.batch_size)):
            if rows % (other.chips * topology.chip.devices):
                continue  # fewer rows than chips
            mesh = MeshConfig(fsdp=min(chosen.mesh.fsdp, other.chips // slices), tensor=1)
            data = dataclasses.replace(chosen.data, batch_size=rows)
            kept.plan(dataclasses.replace(chosen, data=data, mesh=mesh), other, curve)


def seconds_per_row(report: Report) -> float:
    """Between the two bounds, of one row on one chip."""
    middle = (report["step_seconds_overlap"] + report["step_seconds_serial"]) / 2
    return middle / report["rows_per_chip"]


class _Kept:
    """Reports on disk, each made once."""

    def __init__(self, path: Path):
        self.path = path
        self.reports: list[Report] = []
        self.used: list[Report] = []  # of this sweep
        if path.exists():
            try:
                self.reports = json.loads(path.read_text())
            except ValueError as error:
                raise UserError(f"{path}: not JSON ({error}): remove it to start again") from None

    def plan(self, cfg: TrainConfig, topology: Topology, curve: str = "") -> Report:
        report = self._plan(cfg, topology, curve)
        self.used.append(report)
        return report

    def _plan(self, cfg: TrainConfig, topology: Topology, curve: str) -> Report:
        setting = [to_dict(cfg), str(topology), topology.slices, jax.__version__]
        key = json.dumps(setting, sort_keys=True)
        for report in self.reports:
            if report["key"] == key and report["curve"] == curve:
                return report
        started = time.monotonic()
        same = [report for report in self.reports if report["key"] == key]
        try:
            report = dict(same[0]) if same else plan_apart(cfg, topology)
        except CompilerCrash as crash:
            log.warning("%s: %s", _name(topology), crash)
            report = {
                "fits": False, "crashed": True, "topology": str(topology),
                "slices": topology.slices, "chips": topology.chips, "mesh": to_dict(cfg.mesh),
                "remat": to_dict(cfg.remat),
                "rows_per_chip": cfg.data.batch_size / topology.chips,
            }  # fmt: skip
        report |= {"key": key, "curve": curve}
        self.reports.append(report)
        _write(self.path, json.dumps(self.reports))
        verdict = "the compiler crashed" if report.get("crashed") else "does not fit"
        if report["fits"]:
            verdict = f"MFU {report['mfu_serial']:.3f} to {report['mfu_overlap']:.3f}"
        log.info(
            "%s, fsdp %d, %s, %d rows a chip: %s (%.0f s)", _name(topology),
            report["mesh"]["fsdp"], report["remat"]["llama"], report["rows_per_chip"], verdict,
            time.monotonic() - started,
        )  # fmt: skip
        return report


def _name(topology: Topology) -> str:
    return str(topology) + (f" x{topology.slices}" if topology.slices > 1 else "")


def markdown(reports: list[Report]) -> str:
    """One line a setting that fits, best first for each topology."""
    lines = [
        "| topology | chips | data x fsdp x tensor | remat | rows/chip | HBM, GiB | step, s | "
        "tokens/s | MFU, no overlap | MFU, overlap |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = lambda r: (r["topology"], r["slices"], seconds_per_row(r))  # noqa: E731
    for r in sorted((r for r in reports if r["fits"] and not r["curve"]), key=order):
        slices = f" x{r['slices']}" if r["slices"] > 1 else ""
        lines.append(
            f"| {r['topology']}{slices} | {r['chips']} | {' x '.join(map(str, r['mesh'].values()))}"
            f" | {r['remat']['llama']} | {r['rows_per_chip']:g} | {r['hbm_bytes'] / 2**30:.1f} of "
            f"{r['hbm_limit_bytes'] / 2**30:.0f} | {r['step_seconds_overlap']:.2f} to "
            f"{r['step_seconds_serial']:.2f} | {r['tokens_per_second']:,.0f} to "
            f"{r['tokens_per_second_overlap']:,.0f} | {r['mfu_serial']:.3f} | "
            f"{r['mfu_overlap']:.3f} |"
        )
    return "\n".join(lines) + "\n"


# Title, and the keys of the serial and of the overlapped bound.
PANELS = (
    ("tokens per second", "tokens_per_second", "tokens_per_second_overlap"),
    ("model FLOPs utilisation", "mfu_serial", "mfu_overlap"),
)


def draw(reports: list[Report], path: Path) -> None:
    """Tokens per second and MFU over chips: a band between the bounds for each chip and curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels: Any = figure.subplots(1, 2)
    groups: dict[tuple[str, str], list[Report]] = {}
    for report in (r for r in reports if r["fits"]):
        chip = report["topology"].split(":")[0]
        groups.setdefault((chip, report["curve"]), []).append(report)
    colours = {chip: f"C{n}" for n, chip in enumerate(sorted({chip for chip, _ in groups}))}
    for (chip, curve), found in sorted(groups.items()):
        found.sort(key=lambda r: (r["chips"], r["slices"]))
        chips = [r["chips"] for r in found]
        style = {"color": colours[chip], "linestyle": "-" if curve == "weak" else "--"}
        for panel, (_, *bounds) in zip(panels, PANELS, strict=True):
            low, high = ([r[bound] for r in found] for bound in bounds)
            panel.fill_between(chips, low, high, color=colours[chip], alpha=0.12, linewidth=0)
            panel.plot(chips, low, marker="o", markersize=4, label=f"{chip}, {curve}", **style)
            panel.plot(chips, high, linewidth=0.8, **style)
    for panel, (title, *_) in zip(panels, PANELS, strict=True):
        panel.set(xscale="log", xlabel="chips", title=title)
        panel.set_xticks([16, 32, 64, 128, 256, 512], ["16", "32", "64", "128", "256", "512"])
        panel.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[1].set_ylim(0, 1)
    panels[0].legend(fontsize=8)
    temporary = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(temporary, dpi=130)
    temporary.rename(path)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.rename(path)
