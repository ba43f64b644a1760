"""Tries settings on topologies, keeps every report, and draws how the best of them scales.

OUT/sweep.json   every report; a sweep that was stopped goes on from it
OUT/sweep.md     the table
OUT/scaling.png  predicted tokens per second and MFU over chips
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from emu_jax import markdown
from emu_jax.config import to_dict
from emu_jax.errors import UserError
from emu_jax.filesystem import write_text, writing
from emu_jax.hardware import Topology
from emu_jax.plan.plan import (
    SAFE,
    CompilerCrash,
    Report,
    abstract_batch,
    devices_of,
    memory_by_kind,
    plan_in_subprocess,
)
from emu_jax.train.config import MeshConfig, TrainConfig
from emu_jax.train.flops import jaxpr_flops
from emu_jax.train.step import Trainer, mesh_for

log = logging.getLogger(__name__)

# From most memory to least, and so from least computed again to most.
POLICIES = ("dots", "minimal", "full")
ROWS_PER_CHIP = (16, 12, 8, 6, 4, 3, 2, 1)
# Slices along which a scaling curve is drawn, in chips; the last of 2D ones are several slices.
LADDERS: dict[int, tuple[tuple[str, int], ...]] = {
    2: (("4x4", 1), ("8x8", 1), ("16x16", 1), ("16x16", 2)),
    3: (("4x4x4", 1), ("4x4x8", 1), ("8x8x8", 1)),
}
CURVES = ("weak", "strong")
REGION = "sweep"  # of a page, between two HTML comments
HEAD = (
    "topology",
    "chips",
    "data x fsdp x tensor",
    "remat",
    "rows/chip",
    "HBM, GiB",
    "step, s",
    "tokens/s",
    "MFU, no overlap",
    "MFU, overlap",
)
# Before anything was compiled for a chip: the part of its memory that temporaries take.
TEMPORARIES = 0.2


@dataclasses.dataclass(frozen=True)
class Family:
    """Settings that differ in their rows per chip alone, and what tracing one of them says."""

    policy: str
    fsdp: int
    held: float  # bytes of a device, whatever the rows: parameters and optimizer
    kept: float  # bytes of a device that each row of a chip adds: activations and batch
    products: float  # seconds of a chip for each of its rows
    network: float  # seconds of a step, whatever the rows

    def setting(self, cfg: TrainConfig, topology: Topology, rows: int) -> TrainConfig:
        return _setting(cfg, topology, self.policy, self.fsdp, rows)


def _setting(
    cfg: TrainConfig, topology: Topology, policy: str, fsdp: int, rows: int
) -> TrainConfig:
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, batch_size=rows * topology.chips),
        mesh=MeshConfig(fsdp=fsdp, tensor=1),
        remat=dataclasses.replace(cfg.remat, llama=policy),
    )


def family(cfg: TrainConfig, topology: Topology, policy: str, fsdp: int) -> Family:
    """Traces the step at the fewest rows; nothing is compiled."""
    chip = topology.chip
    rows = chip.devices
    cfg = _setting(cfg, topology, policy, fsdp, rows)
    mesh = mesh_for(cfg, devices_of(topology))
    with jax.set_mesh(mesh):
        trainer = Trainer(cfg, mesh)
        batch = abstract_batch(trainer)
        kinds = memory_by_kind(trainer, batch)
        flops = jaxpr_flops(trainer.step.trace(trainer.state_shapes, batch).jaxpr.jaxpr)
    # Of float32 parameters, each is gathered in bfloat16 for both passes, and its gradient summed.
    passed = 3 * kinds["parameters"] * fsdp / 2 * chip.devices
    return Family(
        policy,
        fsdp,
        held=kinds["parameters"] + kinds["optimizer"],
        kept=(kinds["activations"] + kinds["batch"]) / rows,
        products=flops / cfg.data.batch_size / chip.flops,
        network=passed / (sum(topology.link_ways()) * chip.link_bandwidth),
    )


def sweep(
    pairs: Iterable[tuple[TrainConfig, Topology]], out: Path, *, scaling: Sequence[str] = CURVES
) -> Report:
    """Finds the best setting of every topology, and compiles how it scales.

    Compiling is what takes time, so what is sure to lose is left out (`_Search`). Policies are
    tried on one mesh, and the best of them on the other.

    Returns the best report of each topology, under its name.

    Raises:
        UserError: nothing fits a topology.
    """
    out.mkdir(parents=True, exist_ok=True)
    kept = _Kept(out / "sweep.json")
    best: dict[str, Report] = {}
    for cfg, topology in pairs:
        first, *others = _meshes(cfg, topology)
        search = _Search(cfg, topology, kept)
        search.families([family(cfg, topology, policy, first) for policy in POLICIES])
        for fsdp in others:
            policies = [search.best[1].policy] if search.best else POLICIES
            search.families([family(cfg, topology, policy, fsdp) for policy in policies])
        if search.best is None:
            raise UserError(f"no setting fits {topology}: take more chips, or a smaller model")
        best[_name(topology)] = search.best[0]
        _scale(kept, cfg, topology, search.best, scaling)
        _publish(kept.used, out)
    return {"best": best, "reports": len(kept.used), "out": str(out)}


def _publish(reports: list[Report], out: Path) -> None:
    """The table and the plot of what there is so far."""
    write_text(out / "sweep.md", table(reports))
    curves = [report for report in reports if report["curve"]]
    if curves:
        draw(curves, out / "scaling.png")


def _meshes(cfg: TrainConfig, topology: Topology) -> list[int]:
    """Ways of FSDP to try, the likelier first: as many as divide the model, and half of them.

    XLA makes an all-reduce of a gather whose group is the whole slice: then the half goes first.
    """
    wide = dataclasses.replace(cfg.data, batch_size=topology.chips * topology.chip.devices)
    free = dataclasses.replace(cfg, data=wide, mesh=MeshConfig(tensor=1))
    devices = devices_of(topology)
    widest = mesh_for(free, devices).shape["fsdp"]
    ways = [widest, widest // 2] if widest % 2 == 0 else [widest]
    return ways[::-1] if widest * topology.slices == len(devices) else ways


class _Search:
    """The best setting of one topology, found with few compiles.

    Of a family, rows that would not fit are left out: by what is known without compiling, and
    the temporaries of the last compile. The family that promises most goes first; one that
    promises less than what was found is left out: by its products and its network alone, at the
    pace of those that were compiled.
    """

    def __init__(self, cfg: TrainConfig, topology: Topology, kept: _Kept) -> None:
        self.cfg, self.topology, self.kept = cfg, topology, kept
        self.best: tuple[Report, Family] | None = None
        self.last: Report | None = None  # that says what its temporaries take
        self.pace = {"compute": 1.0, "ici": 1.0}  # seconds compiled, over those promised
        self.limit = topology.chip.hbm_bytes / topology.chip.devices

    def families(self, families: Iterable[Family]) -> None:
        waiting = sorted(families, key=self.promise)
        while waiting:
            one = waiting.pop(0)
            if self.best and self.promise(one) >= seconds_per_row(self.best[0]):
                log.info("%s: left out, it promises no less time", self.name(one))
            else:
                self.family(one)
                waiting.sort(key=self.promise)

    def family(self, one: Family) -> None:
        """Compiles from the most rows that may fit downwards, to the first that does."""
        for rows in self.rows():
            if not self.may_fit(one, rows):
                continue
            report = self.kept.plan(one.setting(self.cfg, self.topology, rows), self.topology)
            if not report.get("crashed"):
                self.last = report
            if report["fits"]:
                for kind, promised in (("compute", one.products * rows), ("ici", one.network)):
                    if promised:
                        self.pace[kind] = report["seconds"][kind] / promised
                if self.best is None or seconds_per_row(report) < seconds_per_row(self.best[0]):
                    self.best = (report, one)
                return

    def promise(self, one: Family) -> float:
        """Seconds of a row on a chip, as `seconds_per_row`; HBM traffic comes on top."""
        rows = next((rows for rows in self.rows() if self.may_fit(one, rows)), 0)
        if not rows:
            return math.inf
        products = one.products * rows * self.pace["compute"]
        network = one.network * self.pace["ici"]
        return (max(products, network) + products + network) / 2 / rows

    def rows(self) -> list[int]:
        return [rows for rows in ROWS_PER_CHIP if rows % self.topology.chip.devices == 0]

    def may_fit(self, one: Family, rows: int) -> bool:
        """Half of the temporaries grow with the rows, as a guess; a tenth is taken off, since
        what fits after all is worth a compile."""
        temporaries = TEMPORARIES * self.limit
        if self.last:
            there = self.last["hbm_by_kind"]["temporaries"]
            temporaries = 0.9 * there * (1 + rows / self.last["rows_per_chip"]) / 2
        return one.held + one.kept * rows + temporaries <= self.limit

    def name(self, one: Family) -> str:
        return f"{_name(self.topology)}, fsdp {one.fsdp}, {one.policy}"


def _scale(
    kept: _Kept,
    cfg: TrainConfig,
    topology: Topology,
    best: tuple[Report, Family],
    curves: Sequence[str],
) -> None:
    """Weak scaling (rows per chip of the best) and strong (its rows) over slices that hold it."""
    report, chosen = best
    for shape, slices in LADDERS[topology.chip.torus_axes]:
        other = Topology.parse(f"{topology.chip_name}:{shape}", slices)
        for curve, rows in (
            ("weak", report["rows"] // topology.chips * other.chips),
            ("strong", report["rows"]),
        ):
            per_chip, rest = divmod(rows, other.chips)
            if curve not in curves or rest or per_chip % topology.chip.devices:
                continue  # fewer rows than chips
            devices = other.chips // slices * topology.chip.devices
            one = family(cfg, other, chosen.policy, min(chosen.fsdp, devices))
            needed = one.held + one.kept * per_chip
            if curve == "weak":
                needed += 0.9 * report["hbm_by_kind"]["temporaries"]
            if needed <= topology.chip.hbm_bytes / topology.chip.devices:
                kept.plan(one.setting(cfg, other, per_chip), other, curve)


def seconds_per_row(report: Report) -> float:
    """Between the two bounds, of one row on one chip."""
    middle = (report["step_seconds_overlap"] + report["step_seconds_serial"]) / 2
    return middle / report["rows_per_chip"]


class _Kept:
    """Reports on disk, each made once."""

    def __init__(self, path: Path) -> None:
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
        key = _key(cfg, topology)
        for report in self.reports:
            if report["key"] == key and report["curve"] == curve:
                return report
        started = time.monotonic()
        same = [report for report in self.reports if report["key"] == key]
        try:
            report = dict(same[0]) if same else plan_in_subprocess(cfg, topology)
        except CompilerCrash as crash:
            log.warning("%s: %s", _name(topology), crash)
            report = {
                "fits": False,
                "crashed": True,
                "topology": str(topology),
                "slices": topology.slices,
                "chips": topology.chips,
                "mesh": to_dict(cfg.mesh),
                "remat": to_dict(cfg.remat),
                "rows_per_chip": cfg.data.batch_size / topology.chips,
            }
        report |= {"key": key, "curve": curve}
        self.reports.append(report)
        # A crash may have been the host's: tried again when the sweep goes on.
        whole = [r for r in self.reports if not r.get("crashed")]
        write_text(self.path, json.dumps(whole))
        verdict = "the compiler crashed" if report.get("crashed") else "does not fit"
        if report["fits"]:
            verdict = f"MFU {report['mfu_serial']:.3f} to {report['mfu_overlap']:.3f}"
        log.info(
            "%s, fsdp %d, %s, %d rows a chip: %s (%.0f s)",
            _name(topology),
            report["mesh"]["fsdp"],
            report["remat"]["llama"],
            report["rows_per_chip"],
            verdict,
            time.monotonic() - started,
        )
        return report


def _key(cfg: TrainConfig, topology: Topology) -> str:
    setting = to_dict(dataclasses.replace(cfg, tuned={}))
    compiler = [jax.__version__, version("libtpu"), os.environ.get("LIBTPU_INIT_ARGS", ""), SAFE]
    return json.dumps([setting, str(topology), topology.slices, *compiler], sort_keys=True)


def _name(topology: Topology) -> str:
    return str(topology) + (f" x{topology.slices}" if topology.slices > 1 else "")


def table(reports: list[Report]) -> str:
    """Formats one row for each setting that fits, the best first for each topology."""
    order = lambda r: (r["topology"], r["slices"], seconds_per_row(r))  # noqa: E731
    chosen = sorted((r for r in reports if r["fits"] and not r["curve"]), key=order)
    return markdown.table(HEAD, map(_row, chosen)) + "\n"


def _row(report: Report) -> list[str]:
    r = report
    return [
        f"{r['topology']} x{r['slices']}" if r["slices"] > 1 else r["topology"],
        f"{r['chips']}",
        " x ".join(map(str, r["mesh"].values())),
        r["remat"]["llama"],
        f"{r['rows_per_chip']:g}",
        f"{r['hbm_bytes'] / 2**30:.1f} of {r['hbm_limit_bytes'] / 2**30:.0f}",
        f"{r['step_seconds_overlap']:.2f} to {r['step_seconds_serial']:.2f}",
        f"{r['tokens_per_second']:,.0f} to {r['tokens_per_second_overlap']:,.0f}",
        f"{r['mfu_serial']:.3f}",
        f"{r['mfu_overlap']:.3f}",
    ]


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
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[1].set_ylim(0, 1)
    panels[0].legend(fontsize=8)
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def check_page(page: Path) -> str:
    """Reads a page that has a place for the table.

    Raises:
        UserError: no such page, or it has no place for a table.
    """
    try:
        text = page.read_text()
    except OSError as error:
        raise UserError(f"{page}: {error.strerror}") from None
    if not markdown.has_region(text, REGION):
        lines = " and ".join(markdown.markers(REGION))
        raise UserError(f"{page}: no lines {lines}: add them where the table should stand")
    return text


def put_on_page(out: Path, page: Path) -> None:
    """Writes the sweep's table into its region of a page, and copies the plot beside the page.

    Raises:
        UserError: as `check_page`.
    """
    text = check_page(page)
    write_text(page, markdown.replace_region(text, REGION, (out / "sweep.md").read_text()))
    plot = out / "scaling.png"
    if plot.exists():
        with writing(page.with_name(plot.name)) as temporary:
            shutil.copyfile(plot, temporary)
